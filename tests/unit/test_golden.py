"""Golden sets: found, chosen, opened only when whole, and read back as they were written."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load

from snapshot_tool.base.errors import GoldenDamaged, GoldenNotFound, ManifestInvalid, UsageError
from snapshot_tool.base.protocol import PHASES, Phase
from snapshot_tool.check.sets import verify_goldens
from snapshot_tool.goldens.find import Selection, find_goldens, select_golden
from snapshot_tool.goldens.golden import open_golden
from snapshot_tool.goldens.images import render
from snapshot_tool.goldens.layout import INPUTS, MANIFEST, TAPS, phase_file
from snapshot_tool.goldens.manifest import FileEntry, load_manifest
from snapshot_tool.goldens.verify import find_damage, set_file
from tests.unit.factory import (
    MODULES,
    REVISION,
    TEXT_ONLY,
    TWO_IMAGES,
    flip_bit,
    make_case,
    make_inputs,
    truncate,
    write_golden,
    write_manifest,
)

FILES = [INPUTS, TAPS, *(phase_file(phase) for phase in PHASES)]
OTHER_REVISION = "f" * 40


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Name the goldens folder."""
    return tmp_path / "goldens"


@pytest.fixture
def folder(root: Path) -> Path:
    """Write one golden set and return its folder."""
    return write_golden(root)


def refusal(folder: Path) -> GoldenDamaged:
    """Return the error with which a set is refused."""
    with pytest.raises(GoldenDamaged) as caught:
        open_golden(folder)
    return caught.value


def test_the_one_set_there_is_selected_without_being_named(root: Path, folder: Path) -> None:
    """With nothing said, a single set is the answer."""
    golden = select_golden(root, Selection())
    assert golden.folder == folder
    assert golden.root == root


@pytest.mark.parametrize(
    "selection",
    [
        Selection(checkpoint="local/tiny"),
        Selection(revision=REVISION),
        Selection(revision=REVISION[:7]),
        Selection(device="cpu", dtype="float32"),
        Selection("local/tiny", REVISION, "cpu", "float32"),
    ],
)
def test_a_set_is_selected_by_what_is_said_of_it(
    root: Path, folder: Path, selection: Selection
) -> None:
    """Each of checkpoint, revision (or its beginning), device and dtype finds it."""
    write_golden(
        root, checkpoint="owner/b", revision=OTHER_REVISION, device="cuda", dtype="bfloat16"
    )
    assert select_golden(root, selection).folder == folder


@pytest.mark.parametrize(
    ("selection", "problem", "remedy"),
    [
        (
            Selection("owner/b", OTHER_REVISION, "cuda"),
            "no golden for owner/b at ffffffffffff (cuda)",
            f"snap record --checkpoint owner/b --revision {OTHER_REVISION} --device cuda",
        ),
        (
            Selection(dtype="bfloat16"),
            "no golden for any checkpoint (bfloat16)",
            "snap record --revision SHA --device cpu",
        ),
        (
            Selection(revision="1234567"),
            "no golden for any checkpoint at 1234567",
            "snap record --revision 1234567 --device cpu",
        ),
    ],
)
def test_where_no_set_answers_the_message_says_what_is_there_and_how_to_record(
    root: Path, folder: Path, selection: Selection, problem: str, remedy: str
) -> None:
    """The user sees the sets that there are and the command that makes the one missing."""
    with pytest.raises(GoldenNotFound) as caught:
        select_golden(root, selection)
    assert caught.value.problem == (
        f"{problem} in {root} "
        "(there is: local/tiny at 0123456789ab (cpu-float32), golden version 1)"
    )
    assert caught.value.remedy == f"record it with: {remedy}"


def test_a_folder_without_sets_says_that_there_is_none(root: Path) -> None:
    """A goldens folder that is missing is empty, and not an error of its own."""
    with pytest.raises(GoldenNotFound) as caught:
        select_golden(root, Selection())
    assert caught.value.problem == (
        f"no golden for any checkpoint in {root} (there is: no golden set at all)"
    )
    assert find_goldens(root) == []


def test_several_answering_sets_are_a_usage_error_that_names_them(root: Path, folder: Path) -> None:
    """Nothing is chosen for the user; exit code 2 asks for one more option."""
    write_golden(root, revision=OTHER_REVISION)
    with pytest.raises(UsageError) as caught:
        select_golden(root, Selection(checkpoint="local/tiny"))
    assert caught.value.problem == (
        f"2 golden sets in {root} match local/tiny: "
        "local/tiny at 0123456789ab (cpu-float32), golden version 1, "
        "local/tiny at ffffffffffff (cpu-float32), golden version 1"
    )
    assert caught.value.exit_code == 2


def test_found_sets_are_listed_in_the_order_of_their_folders(root: Path, folder: Path) -> None:
    """Checkpoint, revision, device: sorted, and nothing that is no set."""
    other = write_golden(root, checkpoint="a/b")
    (folder.parent / "notes").mkdir()
    (root / ".snap" / "local--tiny" / "0123456789ab" / "cpu-float32").mkdir(parents=True)
    assert [found.folder for found in find_goldens(root)] == [other, folder]


def test_an_unreadable_manifest_is_listed_with_its_problem(root: Path, folder: Path) -> None:
    """A broken set does not hide the others, nor is it hidden itself."""
    broken = write_golden(root, revision=OTHER_REVISION)
    (broken / MANIFEST).write_bytes(b"{")
    missing = write_golden(root, revision="e" * 40)
    (missing / MANIFEST).unlink()
    first, second, third = find_goldens(root)
    assert (first.folder, first.problem) == (folder, "")
    assert (second.folder, second.manifest) == (missing, None)
    assert second.problem == f"{missing / MANIFEST} is missing"
    assert (third.folder, third.manifest) == (broken, None)
    assert third.problem.startswith(f"{broken / MANIFEST} is not a valid manifest: ")
    assert select_golden(root, Selection()).folder == folder


def test_a_link_that_leads_nowhere_or_round_in_a_circle_is_no_set(root: Path, folder: Path) -> None:
    """A folder of goldens may be a stranger's."""
    for place in (root, folder.parent.parent, folder.parent):
        (place / "loop").symlink_to("loop")
        (place / "nowhere").symlink_to("missing")
        (place / "below").symlink_to(folder / MANIFEST / "x")
    assert [found.folder for found in find_goldens(root)] == [folder]


def test_a_set_behind_a_link_is_found(root: Path, folder: Path) -> None:
    """A checkpoint's folder may lie on another disk."""
    owner = folder.parent.parent
    owner.rename(root.parent / "elsewhere")
    owner.symlink_to(root.parent / "elsewhere")
    assert [found.folder for found in find_goldens(root)] == [folder]


@pytest.mark.parametrize("old", [b'"dtype": "I64"', b'"origin"', b'"schema_version"'])
def test_a_selection_that_only_a_broken_set_might_match_is_refused(
    root: Path, folder: Path, old: bytes
) -> None:
    """A set with an invalid manifest, wherever the fault is, is not reported as never recorded."""
    path = folder / MANIFEST
    path.write_bytes(path.read_bytes().replace(old, old.swapcase()[1:]))
    with pytest.raises(ManifestInvalid, match=r"is not a valid manifest: "):
        select_golden(root, Selection())
    (verified,) = verify_goldens(root, None)
    assert "is not a valid manifest" in verified.damage[0]


def test_a_whole_set_has_no_damage(folder: Path) -> None:
    """What was written is what is recorded."""
    assert find_damage(folder, load_manifest(folder)) == []
    assert open_golden(folder).manifest == load_manifest(folder)


@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_refused_by_name(folder: Path, file: str) -> None:
    """One bit of the last tensor, which is named, one byte less, or no file at all."""
    path = set_file(folder, file)
    before = load(path.read_bytes())
    flip_bit(path, byte=-1)
    after = load(path.read_bytes())
    (altered,) = [key for key in before if before[key].tolist() != after[key].tolist()]
    assert f"{path} was altered: tensor {altered} " in refusal(folder).problem
    truncate(path, size=-1)
    assert refusal(folder).problem.startswith(f"{path} has ")
    path.unlink()
    error = refusal(folder)
    assert error.problem == f"{path} is missing"
    assert "restore it from version control" in error.remedy


@pytest.mark.parametrize("byte", [0, 7, 8, 20])
def test_a_flipped_bit_in_the_header_is_refused_by_file(folder: Path, byte: int) -> None:
    """A header that no longer makes sense is damage of that file, not another error."""
    path = folder / phase_file(Phase.FORWARD)
    flip_bit(path, byte=byte, bit=2)
    assert refusal(folder).problem.startswith(f"{path} ")


def test_a_renamed_tensor_of_the_same_bytes_is_refused(folder: Path) -> None:
    """A tensor under another name, in a file of the same size, is not the one recorded."""
    path = folder / phase_file(Phase.GENERATE)
    data = path.read_bytes()
    names = (b'"two-images/step_topk_ids"', b'"two-images/step_topk_idz"')
    assert data.count(names[0]) == 1
    path.write_bytes(data.replace(*names))
    assert "tensor two-images/step_topk_ids is not the one recorded" in refusal(folder).problem


def test_damage_to_several_files_is_told_one_line_each(folder: Path) -> None:
    """Verifying reports every file; opening reports the first and says how many more."""
    for file in (INPUTS, phase_file(Phase.VISION)):
        truncate(set_file(folder, file), size=-1)
    damage = find_damage(folder, load_manifest(folder))
    assert [line.split(" has ")[0] for line in damage] == [
        str(folder.parent / INPUTS),
        str(folder / phase_file(Phase.VISION)),
    ]
    assert refusal(folder).problem == f"{damage[0]} (1 more: snap verify)"


@pytest.mark.parametrize(
    "name", ["../../../../secret", "/etc/passwd", "notes.txt", "manifest.json", "a/b.safetensors"]
)
def test_a_manifest_that_names_a_foreign_file_is_refused(folder: Path, name: str) -> None:
    """Only the files of a golden set are ever opened, whatever a manifest says."""
    manifest = load_manifest(folder)
    entry = FileEntry(size=0, sha256="0" * 64, tensors={})
    files = {**manifest.files, name: entry}
    write_manifest(folder, msgspec.structs.replace(manifest, files=files))
    assert refusal(folder).problem == (
        f"the manifest names a file that no golden set has: {name!r}"
    )


def test_a_digest_in_the_manifest_that_is_not_its_tensors_is_refused(folder: Path) -> None:
    """Whoever compares two sets takes equal digests for equal bytes, and reads neither."""
    manifest = load_manifest(folder)
    entry = manifest.files[TAPS]
    key, tensor = next(iter(entry.tensors.items()))
    tensors = {**entry.tensors, key: msgspec.structs.replace(tensor, sha256="0" * 64)}
    files = {**manifest.files, TAPS: msgspec.structs.replace(entry, tensors=tensors)}
    write_manifest(folder, msgspec.structs.replace(manifest, files=files))
    assert f"tensor {key} is not the one recorded" in refusal(folder).problem


def test_a_manifest_without_inputs_is_refused(folder: Path) -> None:
    """Every case needs its inputs: a manifest that lost them is damage, and no KeyError later."""
    manifest = load_manifest(folder)
    files = {name: entry for name, entry in manifest.files.items() if name != INPUTS}
    write_manifest(folder, msgspec.structs.replace(manifest, files=files))
    assert refusal(folder).problem == f"the manifest in {folder} names no {INPUTS}"


def test_sets_of_one_revision_share_their_inputs(root: Path, folder: Path) -> None:
    """The inputs lie beside the sets, once."""
    assert set_file(folder, INPUTS) == folder.parent / INPUTS
    assert set_file(folder, TAPS) == folder / TAPS
    shutil.copytree(folder, folder.parent / "cuda-float32")
    assert len(find_goldens(root)) == 2


@pytest.mark.parametrize("named", [TWO_IMAGES, TEXT_ONLY], ids=lambda named: named.name)
def test_inputs_come_back_as_they_were_recorded(folder: Path, *, named: object) -> None:
    """Ids, mask and, where there are images, pixels and their mask; None where there are not."""
    recipe = TWO_IMAGES if named is TWO_IMAGES else TEXT_ONLY
    found, wanted = open_golden(folder).inputs(recipe.name), make_inputs(recipe)
    assert torch.equal(found.input_ids, wanted.input_ids)
    assert torch.equal(found.attention_mask, wanted.attention_mask)
    for one, other in (
        (found.pixel_values, wanted.pixel_values),
        (found.pixel_attention_mask, wanted.pixel_attention_mask),
    ):
        assert (one is None) == (other is None) == (recipe is TEXT_ONLY)
        assert one is None or other is None or torch.equal(one, other)


def test_images_come_back_pixel_by_pixel(folder: Path) -> None:
    """The golden's images are the recipe's, palette and alpha channel included."""
    golden = open_golden(folder)
    found = golden.images(TWO_IMAGES.name)
    wanted = [render(image) for image in TWO_IMAGES.recipe.images]
    assert [image.mode for image in found] == ["P", "RGBA"]
    for one, other in zip(found, wanted, strict=True):
        assert one.size == other.size
        assert one.tobytes() == other.tobytes()
        assert one.convert("RGBA").tobytes() == other.convert("RGBA").tobytes()
    assert list(golden.images(TEXT_ONLY.name)) == []


@pytest.mark.parametrize("phase", PHASES)
def test_every_recorded_tensor_comes_back_by_case_phase_and_name(
    folder: Path, phase: Phase
) -> None:
    """Names are listed sorted, and each gives exactly the tensor that was recorded."""
    golden = open_golden(folder)
    for named in (TWO_IMAGES, TEXT_ONLY):
        wanted = make_case(named).get(phase_file(phase), {})
        assert golden.tensor_names(named.name, phase) == sorted(wanted)
        for name, tensor in wanted.items():
            found = golden.tensor(named.name, phase, name)
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor)


def test_a_tensor_that_was_written_to_is_read_again_as_recorded(folder: Path) -> None:
    """A candidate that computes in place cannot change the golden, in memory or on disk."""
    golden = open_golden(folder)
    before = golden.tensor("text-only", Phase.FORWARD, "logits").clone()
    golden.tensor("text-only", Phase.FORWARD, "logits").zero_()
    assert torch.equal(golden.tensor("text-only", Phase.FORWARD, "logits"), before)
    assert find_damage(folder, golden.manifest) == []


def test_taps_come_back_in_order_of_execution(folder: Path) -> None:
    """Each module's sketch, by name; a side that was not sketched is None."""
    taps = open_golden(folder).taps("text-only")
    assert [tap.module for tap in taps] == list(MODULES)
    assert [tap.input for tap in taps] == [None, None]
    assert [tap.output.shape for tap in taps if tap.output] == [(1, 6, 8), (1, 6, 8)]
    assert open_golden(folder).taps("no-such-case") == []


def test_a_tensor_that_is_not_there_is_golden_damaged(folder: Path) -> None:
    """A key that the file lacks is damage with file and key, not safetensors' own error."""
    with pytest.raises(GoldenDamaged) as caught:
        open_golden(folder).tensor("text-only", Phase.FORWARD, "nothing")
    assert caught.value.problem == f"{folder / 'forward.safetensors'} has no text-only/nothing"
