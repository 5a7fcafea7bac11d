"""Commands on golden sets that run no model: list, show, verify, diff, ask, push, pull."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import click

from snapshot_tool.check.sets import find_golden, locate_difference, open_both, verify_goldens
from snapshot_tool.cli.console import TerminalProgress
from snapshot_tool.cli.options import (
    golden_argument,
    goldens_option,
    html_option,
    json_option,
    markdown_option,
    require_files,
    write_files,
)
from snapshot_tool.goldens.coverage import coverage, generated_tokens
from snapshot_tool.goldens.find import FoundSet, how_to_get, iterate_goldens
from snapshot_tool.goldens.lock import lock_path
from snapshot_tool.goldens.manifest import Manifest, Storage, encode
from snapshot_tool.reports.json import write_json
from snapshot_tool.reports.text import localisation_lines, remarks

_DAMAGED = 3


@click.command("list", short_help="List the golden sets.", epilog="Example: snap list")
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
@goldens_option
def list_command(*, as_json: bool, goldens: Path) -> int:
    """List every golden set: checkpoint, revision, device, version, cases, size.

    Only manifests are read. snap verify finds damage in other files.
    """
    # One at a time: a thousand manifests take hundreds of megabytes.
    found = [_summary(one) for one in iterate_goldens(goldens)]
    if as_json:
        click.echo(json.dumps(found, indent=2))
    elif found:
        click.echo("\n".join(map(_line, found)))
    else:
        click.echo(f"no golden set in {goldens}: {how_to_get(goldens)}")
    return _DAMAGED if any(one["problem"] for one in found) else 0


def _summary(found: FoundSet) -> dict[str, Any]:
    manifest = found.manifest
    summary = {"folder": str(found.folder), "problem": found.problem}
    if manifest is None:
        return summary
    return {
        **summary,
        "checkpoint": manifest.checkpoint.name,
        "revision": manifest.checkpoint.revision,
        "device": manifest.device,
        "dtype": manifest.dtype,
        "golden_version": manifest.golden_version,
        "cases": len(manifest.cases),
        "bytes": sum(entry.size for entry in manifest.files.values()),
    }


def _line(one: dict[str, Any]) -> str:
    if one["problem"]:
        return f"{one['folder']}  unreadable: {one['problem']}"
    return (
        f"{one['checkpoint']}  {one['revision'][:12]}  {one['device']}-{one['dtype']}  "
        f"version {one['golden_version']}  {one['cases']} cases  {one['bytes'] / 1e6:.1f} MB"
    )


@click.command("show", short_help="Show a golden set.", epilog="Example: snap show cpu-float32")
@golden_argument("golden", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the whole manifest.")
@goldens_option
def show_command(*, golden: str | None, as_json: bool, goldens: Path) -> int:
    """Show the source and contents of a golden set.

    GOLDEN is its folder, a part of its path, or the checkpoint's name. It is not needed if there is
    only one golden set.
    """
    folder, manifest = find_golden(goldens, golden)
    if as_json:
        click.echo(encode(manifest).decode(), nl=False)
        return 0
    click.echo(manifest.title)
    click.echo(f"folder    {folder}")
    click.echo(f"revision  {manifest.checkpoint.revision}")
    _show_facts(manifest)
    for one in coverage(manifest, manifest.cases, generated_tokens(folder, manifest)):
        click.echo(f"{'covered  ' if one.reached else 'not covered'} {one.text}")
    _show_cases(manifest)
    return 0


def _show_facts(manifest: Manifest) -> None:
    environment = manifest.environment
    if manifest.storage is not Storage.FULL:
        click.echo(f"storage   {manifest.storage}: sample, moments, signed sums of large tensors")
    packages = ("transformers", "huggingface_hub", "torch", "python", "processor")
    facts = ", ".join(f"{name} {environment[name]}" for name in packages if name in environment)
    click.echo(f"made with {facts}")
    draws = manifest.draws
    click.echo(
        f"drawn     {draws.variants} variants from seed {manifest.seed}, {draws.refused} refused"
    )
    for reason, count in draws.reasons.items():
        click.echo(f"          {count} x {reason}")
    for name, reason in draws.left_out.items():
        click.echo(f"left out  {name}: {reason}")
    for remark in remarks(manifest):
        click.echo(f"remark    {remark}")
    if manifest.checkpoint.unknown_fields:
        fields = ", ".join(manifest.checkpoint.unknown_fields)
        click.echo(f"unknown   {fields}: unknown to the reference, from config.json")
    for entry in manifest.history:
        click.echo(f"version {entry.version} {entry.when}: {entry.reason}")
        made = [f"by snap {entry.snap}: {entry.command}"] if entry.command else []
        for line in (*made, *(f"moved: {line}" for line in entry.moved)):
            click.echo(f"    {line}")
    click.echo("tolerances")
    for phase, tolerance in manifest.tolerances.items():
        single, several = tolerance.single, tolerance.several_images
        text = f"atol {single.atol:g}, rtol {single.rtol:g}"
        if several != single:
            text += f"; several images: atol {several.atol:g}, rtol {several.rtol:g}"
        click.echo(f"    {phase.value:<14}{text}")


def _show_cases(manifest: Manifest) -> None:
    click.echo("cases")
    for case in manifest.cases:
        click.echo(
            f"    {case.name:<12} {case.images} images, {case.tiles} tiles, {case.tokens} tokens: "
            f"{_short(case.text)} -> {_short(case.generated)}"
        )
        if case.eos_token_ids is not None:
            click.echo(f"    {'':<12} ends at token {', '.join(map(str, case.eos_token_ids))}")


def _short(text: str, width: int = 48) -> str:
    quoted = repr(text)
    return quoted if len(quoted) <= width else quoted[: width - 2] + "…'"


@click.command(
    "verify", short_help="Verify the files of golden sets.", epilog="Example: snap verify"
)
@golden_argument("golden", required=False)
@goldens_option
def verify_command(*, golden: str | None, goldens: Path) -> int:
    """Compare every byte of the golden sets (or of GOLDEN) with the recorded digests.

    No model runs, and no file is changed. Exit code 3: a file is missing or damaged.
    """
    verifications = verify_goldens(goldens, golden)
    for verification in verifications:
        if not verification.damage:
            click.echo(f"intact   {verification.title}")
            continue
        click.echo(f"DAMAGED  {verification.title}")
        for line in verification.damage:
            click.echo(f"         {line}")
    return _DAMAGED if any(v.damage for v in verifications) else 0


@click.command(
    "diff",
    short_help="Compare two golden sets.",
    epilog="Example: snap diff goldens/a--b/0123456789ab/cpu-float32 other/a--b/…/cpu-float32",
)
@golden_argument("one")
@golden_argument("other")
@json_option
@html_option
@markdown_option
@goldens_option
def diff_command(
    *,
    one: str,
    other: str,
    json_path: Path | None,
    html_path: Path | None,
    markdown_path: Path | None,
    goldens: Path,
) -> int:
    """Show which recorded tensors differ between two golden sets, and by how much.

    ONE and OTHER are folders, or parts of their paths below --goldens, for example of two
    revisions, transformers versions or devices. Exit code 0: all differences are within ONE's
    tolerances; 1: some are not.
    """
    from snapshot_tool.diagnose.diff import diff_goldens
    from snapshot_tool.reports.diff import diff_lines, diff_to_html, diff_to_markdown

    require_files(json_path, html_path, markdown_path)
    both = open_both(goldens, one, other)
    diff = diff_goldens(*both)
    if "-" not in map(str, (json_path, html_path, markdown_path)):
        for line in (*diff_lines(diff), *localisation_lines(locate_difference(*both))):
            click.echo(line)
    write_files(
        (json_path, partial(write_json, diff)),
        (html_path, partial(diff_to_html, diff)),
        (markdown_path, partial(diff_to_markdown, diff)),
    )
    return 0 if diff.within else 1


@click.command(
    "ask",
    short_help="Write the questions of a golden set.",
    epilog="Example: snap ask cpu-float32 --out questions",
)
@golden_argument("golden", required=False)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="Folder of the questions; it must be empty or missing.",
)
@click.option(
    "--format",
    "kind",
    type=click.Choice(["snap", "aftu"]),
    default="snap",
    show_default=True,
    help="Format of the files: snap's, or the validation information of aiu-fms-testing-utils.",
)
@click.option("--model-id", metavar="NAME", help="aftu: the model's name there.")
@click.option("--attn-type", default="sdpa", show_default=True, help="aftu: kind of attention.")
@click.option("--aftu-version", default="0.8.1", show_default=True, help="aftu: its version.")
@goldens_option
def ask_command(
    *,
    golden: str | None,
    out: Path,
    kind: str,
    model_id: str | None,
    attn_type: str,
    aftu_version: str,
    goldens: Path,
) -> int:
    """Write the inputs of a golden set as files, for an engine that snap cannot import.

    GOLDEN is its folder, a part of its path, or the checkpoint's name. The files are JSON,
    safetensors and PNG. docs/answers.md describes them, and the files that answer them.
    With --format aftu, the recorded tokens and logits are written as aiu-fms-testing-utils reads
    them, so that its tests compare a device with Hugging Face.
    """
    from snapshot_tool.check.ask import ask, ask_aftu
    from snapshot_tool.goldens.golden import open_golden

    folder, manifest = find_golden(goldens, golden)
    opened = open_golden(folder, manifest)
    if kind == "aftu":
        batches = ask_aftu(
            opened,
            out,
            model_id=model_id or manifest.checkpoint.name,
            attn_type=attn_type,
            version=aftu_version,
        )
        for path, cases, length in batches:
            click.echo(f"{path}: {', '.join(cases)}, padded to {length}")
        return 0
    ask(opened, out, TerminalProgress())
    click.echo(f"wrote the questions of {len(manifest.cases)} cases to {out}")
    click.echo("judge the answers with: snap judge ANSWERS")
    return 0


remote_argument = click.argument("remote", required=False)
only_option = click.option(
    "--only",
    default="",
    metavar="TEXT",
    help="Only sets with this text in owner/name/revision/device-dtype.",
)


@click.command(
    "push",
    short_help="Upload golden sets to a remote.",
    epilog="Example: snap push hf://datasets/owner/goldens",
)
@remote_argument
@only_option
@click.option("--again", is_flag=True, help="Also upload files that the remote has.")
@click.option(
    "--sign",
    "key",
    type=click.Path(path_type=Path),
    metavar="KEY",
    help="Sign goldens.lock with this private key of ssh-keygen -t ed25519.",
)
@goldens_option
def push_command(
    *, remote: str | None, only: str, again: bool, key: Path | None, goldens: Path
) -> int:
    """Upload the files of golden sets that the remote lacks, and write goldens.lock.

    REMOTE is hf://datasets/OWNER/NAME, s3://BUCKET/PREFIX or file:///FOLDER, by default the one in
    goldens.lock beside the goldens folder. Commit this file: snap pull reads it.
    """
    from snapshot_tool.goldens.lock import read_private_key, sign
    from snapshot_tool.goldens.sync import push

    private = read_private_key(key) if key else None  # before anything is uploaded
    shared = push(goldens, TerminalProgress(), remote=remote, only=only, again=again)
    if private:
        sign(lock_path(goldens), private)
    for item in shared.sets:
        word = "pushed" if item in shared.moved else "same"
        click.echo(f"{word:<8}{item.title}")
    click.echo(f"{shared.sent / 1e6:.1f} MB uploaded to {shared.remote}")
    click.echo(f"{lock_path(goldens)} lists these sets: commit it to git")
    return 0


@click.command(
    "pull", short_help="Download golden sets from a remote.", epilog="Example: snap pull"
)
@remote_argument
@only_option
@click.option("--replace", is_flag=True, help="Also replace sets that were recorded locally.")
@click.option(
    "--require-signer",
    "key",
    type=click.Path(path_type=Path),
    metavar="KEY",
    help="Refuse a goldens.lock that was not signed with the private key of this public key.",
)
@goldens_option
def pull_command(
    *, remote: str | None, only: str, replace: bool, key: Path | None, goldens: Path
) -> int:
    """Download the missing files of the golden sets in goldens.lock.

    REMOTE is by default the one in goldens.lock. Every byte is compared with the digests in the
    lock. If any differs, the exit code is 3 and no set is changed.
    """
    from snapshot_tool.goldens.lock import require_signed
    from snapshot_tool.goldens.sync import pull

    if key:
        require_signed(lock_path(goldens), key)
    shared = pull(goldens, TerminalProgress(), remote=remote, only=only, replace=replace)
    for item in shared.sets:
        word = "pulled" if item in shared.moved else "here"
        click.echo(f"{word:<8}{item.title}")
    click.echo(f"{shared.sent / 1e6:.1f} MB downloaded from {shared.remote}")
    return 0
