"use strict";
// Filters the grid and the cases, and opens the target of a link in the grid or the curve.
const text = document.getElementById("filter-text");
const verdict = document.getElementById("filter-verdict");
const count = document.getElementById("filter-count");
const rows = [...document.querySelectorAll("[data-verdict]")];

function matches(row) {
  const wanted = text.value.trim().toLowerCase();
  return (
    row.dataset.text.toLowerCase().includes(wanted) &&
    ["", row.dataset.verdict].includes(verdict.value)
  );
}

function filter() {
  for (const row of rows) row.hidden = !matches(row);
  const cases = rows.filter((row) => row.matches("tr"));
  const shown = cases.filter((row) => !row.hidden).length;
  count.textContent = `${shown} of ${cases.length} cases`;
}

function reveal() {
  const target = document.getElementById(location.hash.slice(1));
  if (!target) return;
  for (let part = target; part; part = part.parentElement) {
    if (part.matches("details.case")) part.hidden = false;
    if (part.matches("details")) part.open = true;
  }
  target.scrollIntoView();
  target.focus({ preventScroll: true });
}

text.addEventListener("input", filter);
verdict.addEventListener("change", filter);
window.addEventListener("hashchange", reveal);
for (const link of document.querySelectorAll(".grid a, .curve a, .summary a")) {
  // A second click on the same link does not change the hash.
  link.addEventListener("click", () => setTimeout(reveal));
}
for (const button of document.querySelectorAll("button[data-open]")) {
  button.addEventListener("click", () => {
    for (const details of document.querySelectorAll("details.case"))
      details.open = button.dataset.open === "yes";
  });
}
filter();
reveal();
