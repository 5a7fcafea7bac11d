// Returns the texts whose colour is too near to the nearest background that is painted.
function luminance(c) {
  const [r, g, b] = c.map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b;
}
const numbers = c => (c.match(/[\d.]+/g) || []).map(Number);
const poor = new Set();
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const node = walker.currentNode, element = node.parentElement;
  if (!node.data.trim() || element.closest('script, style') || !element.getClientRects().length) continue;
  const style = getComputedStyle(element);
  const ink = numbers(element.closest('svg') ? style.fill : style.color);
  let under = element, paper = numbers(getComputedStyle(under).backgroundColor);
  while (paper[3] === 0 && under.parentElement) {
    under = under.parentElement;
    paper = numbers(getComputedStyle(under).backgroundColor);
  }
  const [dark, light] = [ink, paper].map(c => luminance(c.slice(0, 3))).sort((a, b) => a - b);
  const contrast = (light + .05) / (dark + .05);
  if (contrast < 4.5) poor.add(`${contrast.toFixed(1)} ${element.tagName} ${node.data.trim().slice(0, 20)}`);
}
return [...poor];
