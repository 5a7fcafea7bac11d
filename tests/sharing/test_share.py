"""Golden sets travel whole or not at all: to a folder, to S3 and to the hub, and back."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from safetensors.torch import load_file, save_file

from snapshot_tool.base.errors import (
    GoldenDamaged,
    GoldenExists,
    GoldenLocked,
    GoldenNotFound,
    LockInvalid,
    RemoteUnavailable,
    SnapError,
    UsageError,
)
from snapshot_tool.base.protocol import Progress
from snapshot_tool.goldens.layout import SetLocation
from snapshot_tool.goldens.lock import load_lock, lock_path
from snapshot_tool.goldens.manifest import HistoryEntry, load_manifest
from snapshot_tool.goldens.sync import Remote, clean_remote, pull, push
from snapshot_tool.goldens.tensors import describe_file
from snapshot_tool.goldens.transaction import recording_lock
from snapshot_tool.goldens.verify import find_damage
from tests.sharing.conftest import Place
from tests.unit.factory import REVISION, flip_bit, write_golden, write_manifest


class Counting(Progress):
    """Keeps how many steps of each stage were announced and done."""

    def __init__(self) -> None:
        self.stages: dict[str, tuple[int, int]] = {}

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Iterator[int]]:
        self.stages[title] = (total, 0)
        yield self._steps(title)

    def _steps(self, title: str) -> Iterator[int]:
        while True:
            total, done = self.stages[title]
            self.stages[title] = (total, done + 1)
            yield done + 1

    def now(self, what: str) -> None:
        raise AssertionError(what)

    def note(self, message: str) -> None:
        raise AssertionError(message)


def contents(root: Path) -> dict[str, bytes]:
    """Return every file of the golden sets, by relative path."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and ".snap" not in path.parts
    }


def new_version(folder: Path, *, reason: str = "mended") -> None:
    """Make the set in a folder its own next version, as an update would."""
    manifest = load_manifest(folder)
    version = manifest.golden_version + 1
    entry = HistoryEntry(version=version, when="2025-03-04", reason=reason, moved=())
    history = (*manifest.history, entry)
    changed = msgspec.structs.replace(manifest, golden_version=version, history=history)
    write_manifest(folder, changed)


@pytest.fixture
def goldens(tmp_path: Path) -> Path:
    """Write one golden set."""
    write_golden(tmp_path / "goldens")
    return tmp_path / "goldens"


@pytest.fixture
def elsewhere(goldens: Path, tmp_path: Path) -> Path:
    """Return the goldens folder of another checkout: it has goldens.lock and nothing else."""
    other = tmp_path / "other" / "goldens"
    other.parent.mkdir()
    return other


def give_lock(goldens: Path, elsewhere: Path) -> None:
    """Carry goldens.lock to the other checkout, as git does."""
    shutil.copy(lock_path(goldens), lock_path(elsewhere))


def test_what_was_pushed_is_pulled_to_the_byte(
    goldens: Path, elsewhere: Path, place: Place
) -> None:
    """Every remote gives back every file, and the lock names the digest of each."""
    pushed = push(goldens, Counting(), remote=place.url)
    give_lock(goldens, elsewhere)
    pulled = pull(elsewhere, Counting())
    assert contents(elsewhere) == contents(goldens)
    size = sum(len(data) for data in contents(goldens).values())
    assert pushed.sent == pulled.sent == size
    digests = {hashlib.sha256(data).hexdigest() for data in contents(goldens).values()}
    (locked,) = load_lock(lock_path(goldens)).sets
    assert {file.sha256 for file in locked.files.values()} == digests
    assert {name.removeprefix("objects/").partition(".")[0] for name in place.objects} == digests


def test_only_what_is_missing_travels(goldens: Path, elsewhere: Path, place: Place) -> None:
    """A new version whose manifest alone differs is one small file, both ways."""
    push(goldens, Counting(), remote=place.url)
    give_lock(goldens, elsewhere)
    pull(elsewhere, Counting())
    again = push(goldens, Counting())
    assert (again.sent, again.moved) == (0, ())
    assert pull(elsewhere, Counting()).sent == 0
    (manifest,) = goldens.glob("*/*/*/manifest.json")
    new_version(manifest.parent)
    small = manifest.stat().st_size
    assert push(goldens, Counting()).sent == small
    give_lock(goldens, elsewhere)
    pulled = pull(elsewhere, Counting())
    assert (pulled.sent, len(pulled.moved)) == (small, 1)
    assert contents(elsewhere) == contents(goldens)


def test_other_bytes_under_a_digest_are_refused(
    goldens: Path, elsewhere: Path, place: Place
) -> None:
    """The manifest as a file of tensors: exit code 3, and nothing is put in place."""
    push(goldens, Counting(), remote=place.url)
    give_lock(goldens, elsewhere)
    for name in {name.rpartition(".")[2]: name for name in place.objects}.values():
        whole = place.objects[name]
        place.objects[name] = whole[:-1] + bytes([whole[-1] ^ 1])
        with pytest.raises(GoldenDamaged, match="has other bytes under") as raised:
            pull(elsewhere, Counting())
        assert raised.value.exit_code == 3
        assert contents(elsewhere) == {}
        place.objects[name] = whole
        shutil.rmtree(elsewhere)
    pull(elsewhere, Counting())
    assert contents(elsewhere) == contents(goldens)


def test_a_cut_object_is_refused_and_pushed_again(
    goldens: Path, elsewhere: Path, place: Place
) -> None:
    """Another size is no whole object: pull refuses it, the next push mends it."""
    push(goldens, Counting(), remote=place.url)
    give_lock(goldens, elsewhere)
    name = next(iter(place.objects))
    whole = place.objects[name]
    place.objects[name] = whole[:-1]
    with pytest.raises(GoldenDamaged):
        pull(elsewhere, Counting())
    assert contents(elsewhere) == {}
    assert push(goldens, Counting()).sent == len(whole)
    pull(elsewhere, Counting())
    assert contents(elsewhere) == contents(goldens)


def test_an_altered_object_of_the_same_size_is_mended_by_push_again(
    goldens: Path, elsewhere: Path, folder: Place
) -> None:
    """A remote is trusted for sizes alone; `--again` sends everything."""
    push(goldens, Counting(), remote=folder.url)
    give_lock(goldens, elsewhere)
    name = next(iter(folder.objects))
    folder.objects[name] = bytes(len(folder.objects[name]))
    assert push(goldens, Counting()).sent == 0
    push(goldens, Counting(), again=True)
    pull(elsewhere, Counting())
    assert contents(elsewhere) == contents(goldens)


def test_a_lost_object_is_an_error_that_names_it(
    goldens: Path, elsewhere: Path, place: Place
) -> None:
    """Not a traceback of the remote's client."""
    push(goldens, Counting(), remote=place.url)
    give_lock(goldens, elsewhere)
    name = next(iter(place.objects))
    del place.objects[name]
    with pytest.raises(RemoteUnavailable) as raised:
        pull(elsewhere, Counting())
    assert name.removeprefix("objects/") in raised.value.problem
    assert contents(elsewhere) == {}


def test_a_place_that_is_not_there_is_an_error_of_two_lines(goldens: Path, place: Place) -> None:
    """And no lock is written that would name it."""
    with pytest.raises(RemoteUnavailable) as raised:
        push(goldens, Counting(), remote=place.nowhere)
    assert place.nowhere in raised.value.problem
    assert len(str(raised.value).splitlines()) == 2
    assert not lock_path(goldens).exists()


def test_a_token_that_may_not_write_is_an_error(
    goldens: Path, hub: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's own words, without a traceback."""
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    with pytest.raises(RemoteUnavailable, match="401"):
        push(goldens, Counting(), remote=hub.url)


def test_missing_s3_credentials_are_an_error(
    goldens: Path, s3: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Botocore's errors are none of Python's own."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(RemoteUnavailable, match="redentials"):
        push(goldens, Counting(), remote=s3.url)


def interrupt_after(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Make the connection break after so many blocks, once."""
    whole = Remote.blocks
    left = [count]

    def broken(self: Remote, name: str, *, start: int, size: int) -> Iterator[bytes]:
        for block in whole(self, name, start=start, size=size):
            for offset in range(0, len(block), 4096):
                if left[0] == 0:
                    left[0] = -1
                    raise KeyboardInterrupt
                left[0] -= 1
                yield block[offset : offset + 4096]

    monkeypatch.setattr(Remote, "blocks", broken)


def test_an_interrupted_pull_goes_on_where_it_stopped(
    goldens: Path, elsewhere: Path, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Amid a file: what had come is not fetched again, and half a set is never seen."""
    pushed = push(goldens, Counting(), remote=place.url)
    give_lock(goldens, elsewhere)
    interrupt_after(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        pull(elsewhere, Counting())
    assert contents(elsewhere) == {}
    came = sum(path.stat().st_size for path in elsewhere.rglob(".snap/**/objects/*"))
    assert came > 8192
    assert pull(elsewhere, Counting()).sent == pushed.sent - came
    assert contents(elsewhere) == contents(goldens)


def test_a_spoilt_partial_file_is_found_by_its_digest(
    goldens: Path, elsewhere: Path, folder: Place
) -> None:
    """What an earlier pull left is no more trusted than what the remote sends."""
    push(goldens, Counting(), remote=folder.url)
    give_lock(goldens, elsewhere)
    (locked,) = load_lock(lock_path(goldens)).sets
    store = locked.location(elsewhere).work_folder / "pull" / "objects"
    store.mkdir(parents=True)
    name = locked.files["vision.safetensors"].object_name("vision.safetensors")
    (store / f"{name}.partial").write_bytes(b"other bytes")
    with pytest.raises(GoldenDamaged):
        pull(elsewhere, Counting())
    pull(elsewhere, Counting())
    assert contents(elsewhere) == contents(goldens)


def test_a_damaged_set_is_mended_by_a_pull(goldens: Path, folder: Place) -> None:
    """Only the damaged file is fetched."""
    push(goldens, Counting(), remote=folder.url)
    before = contents(goldens)
    (vision,) = goldens.glob("*/*/*/vision.safetensors")
    flip_bit(vision, byte=-3)
    assert pull(goldens, Counting()).sent == vision.stat().st_size
    assert contents(goldens) == before


def test_a_damaged_set_is_not_pushed(goldens: Path, folder: Place) -> None:
    """Its files are read before anything is sent."""
    (vision,) = goldens.glob("*/*/*/vision.safetensors")
    flip_bit(vision, byte=-3)
    with pytest.raises(GoldenDamaged, match=r"vision\.safetensors was altered"):
        push(goldens, Counting(), remote=folder.url)
    assert len(folder.objects) == 0


def test_a_set_recorded_here_is_not_lost_by_a_pull(
    goldens: Path, elsewhere: Path, folder: Place
) -> None:
    """Another history is refused; --replace says that it may go."""
    push(goldens, Counting(), remote=folder.url)
    shutil.copytree(goldens, elsewhere)
    give_lock(goldens, elsewhere)
    (here,) = elsewhere.glob("*/*/cpu-float32")
    new_version(here, reason="not pushed yet")
    before = contents(elsewhere)
    with pytest.raises(GoldenExists, match="earlier version of the one to pull"):
        pull(elsewhere, Counting())
    assert contents(elsewhere) == before
    pull(elsewhere, Counting(), replace=True)
    assert contents(elsewhere) == contents(goldens)


def test_sets_of_other_devices_stay_when_one_is_pulled(goldens: Path, folder: Place) -> None:
    """They share the inputs of the revision; a pull leaves them as they are."""
    push(goldens, Counting(), remote=folder.url)
    other = add_device(goldens)
    cpu = other.with_name("cpu-float32")
    shutil.rmtree(cpu)
    pull(goldens, Counting())
    for kept in (cpu, other):
        assert find_damage(kept, load_manifest(kept)) == []


def add_device(goldens: Path) -> Path:
    """Put a set of another device beside the one of the CPU, with the same inputs."""
    (cpu,) = goldens.glob("*/*/cpu-float32")
    other = Path(shutil.copytree(cpu, cpu.with_name("cuda-float32")))
    write_manifest(other, msgspec.structs.replace(load_manifest(other), device="cuda"))
    return other


def test_all_devices_of_a_revision_come_at_once(
    goldens: Path, elsewhere: Path, folder: Place
) -> None:
    """The inputs that they share are one file, and travel once."""
    add_device(goldens)
    pushed = push(goldens, Counting(), remote=folder.url)
    give_lock(goldens, elsewhere)
    assert pull(elsewhere, Counting()).sent == pushed.sent
    assert contents(elsewhere) == contents(goldens)
    # All files but the manifests are the same: each travelled once.
    assert len(folder.objects) == len({hash(data) for data in contents(goldens).values()})


def test_sets_of_one_revision_never_get_different_inputs(
    goldens: Path, elsewhere: Path, folder: Place
) -> None:
    """A set here that was recorded from other inputs is kept, and the pull refused."""
    push(goldens, Counting(), remote=folder.url)
    give_lock(goldens, elsewhere)
    shutil.copytree(goldens, elsewhere)
    other = add_device(elsewhere)
    shutil.rmtree(other.with_name("cpu-float32"))
    inputs = other.parent / "inputs.safetensors"
    tensors = load_file(inputs)
    tensors["text-only/input_ids"] += 1
    save_file(tensors, inputs)
    manifest = load_manifest(other)
    files = {**manifest.files, "inputs.safetensors": describe_file(inputs)}
    write_manifest(other, msgspec.structs.replace(manifest, files=files))
    before = contents(elsewhere)
    with pytest.raises(GoldenExists, match="would have different inputs"):
        pull(elsewhere, Counting())
    assert contents(elsewhere) == before


def test_an_interrupted_push_writes_no_lock_and_goes_on(
    goldens: Path, folder: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What had arrived whole is not sent again; the lock names nothing that is not there."""
    upload = Remote.upload
    left = [3]

    def broken(self: Remote, path: Path, name: str, advance: Any) -> None:
        if left[0] == 0:
            left[0] = -1
            raise KeyboardInterrupt
        left[0] -= 1
        upload(self, path, name, advance)

    monkeypatch.setattr(Remote, "upload", broken)
    with pytest.raises(KeyboardInterrupt):
        push(goldens, Counting(), remote=folder.url)
    assert not lock_path(goldens).exists()
    arrived = sum(len(folder.objects[name]) for name in folder.objects)
    size = sum(len(data) for data in contents(goldens).values())
    assert 0 < arrived < size
    assert push(goldens, Counting(), remote=folder.url).sent == size - arrived


def test_only_chooses_sets_by_a_part_of_their_name(
    goldens: Path, elsewhere: Path, folder: Place
) -> None:
    """A CI job needs one set, not all."""
    write_golden(goldens, checkpoint="other/model")
    push(goldens, Counting(), remote=folder.url)
    give_lock(goldens, elsewhere)
    pulled = pull(elsewhere, Counting(), only="other/model")
    assert [item.checkpoint for item in pulled.sets] == ["other/model"]
    assert {name.partition("/")[0] for name in contents(elsewhere)} == {"other--model"}
    with pytest.raises(GoldenNotFound):
        pull(elsewhere, Counting(), only="nothing")
    with pytest.raises(GoldenNotFound):
        push(goldens, Counting(), only="nothing")


def test_a_push_to_another_remote_must_not_leave_a_set_behind(
    goldens: Path, folder: Place, tmp_path: Path
) -> None:
    """goldens.lock names one remote: all that it names must lie there."""
    write_golden(goldens, checkpoint="other/model")
    push(goldens, Counting(), remote=folder.url)
    before = lock_path(goldens).read_bytes()
    with pytest.raises(GoldenNotFound, match="also names local/tiny"):
        push(goldens, Counting(), remote=f"file://{tmp_path}/new", only="other/model")
    assert lock_path(goldens).read_bytes() == before
    push(goldens, Counting(), remote=f"file://{tmp_path}/new")
    assert load_lock(lock_path(goldens)).remote == f"file://{tmp_path}/new"


def test_progress_counts_every_megabyte(goldens: Path, elsewhere: Path, folder: Place) -> None:
    """One step each, none left at the end."""
    progress = Counting()
    push(goldens, progress, remote=folder.url)
    give_lock(goldens, elsewhere)
    pull(elsewhere, progress)
    assert progress.stages["pushing (MB)"] == progress.stages["pulling (MB)"] == (1, 1)


def test_a_pull_waits_for_no_recorder(goldens: Path, folder: Place) -> None:
    """While a revision is being recorded, neither push nor pull touches it."""
    push(goldens, Counting(), remote=folder.url)
    shutil.rmtree(next(goldens.glob("*/*/cpu-float32")))
    location = SetLocation(goldens, "local/tiny", REVISION, "cpu", "float32")
    with recording_lock(location), pytest.raises(GoldenLocked):
        pull(goldens, Counting())


def spoil_lock(path: Path, change: Any) -> None:
    """Change the lock's JSON."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


HOSTILE_LOCKS = {
    "name with a way up": lambda c: c["sets"][0].update(checkpoint="../../etc"),
    "absolute name": lambda c: c["sets"][0].update(checkpoint="/etc/passwd"),
    "revision with a slash": lambda c: c["sets"][0].update(revision="../" * 20),
    "device with a slash": lambda c: c["sets"][0].update(device="../cpu"),
    "another dtype": lambda c: c["sets"][0].update(dtype="float32/.."),
    "file with a way up": lambda c: c["sets"][0]["files"].update(
        {"../x.json": {"size": 1, "sha256": "a" * 64}}
    ),
    "file of code": lambda c: c["sets"][0]["files"].update(
        {"x.py": {"size": 1, "sha256": "a" * 64}}
    ),
    "digest with a slash": lambda c: c["sets"][0]["files"]["manifest.json"].update(
        sha256="../" + "a" * 61
    ),
    "negative size": lambda c: c["sets"][0]["files"]["manifest.json"].update(size=-1),
    "no manifest": lambda c: c["sets"][0]["files"].pop("manifest.json"),
    "the same set twice": lambda c: c.update(sets=c["sets"] * 2),
    "another schema": lambda c: c.update(schema="snap-lock/2"),
    "unknown field": lambda c: c.update(run="rm -rf"),
}


@pytest.mark.parametrize("change", HOSTILE_LOCKS.values(), ids=HOSTILE_LOCKS)
def test_a_hostile_lock_is_refused(goldens: Path, folder: Place, change: Any) -> None:
    """It may come with somebody's pull request: no path of it leaves the goldens folder."""
    push(goldens, Counting(), remote=folder.url)
    shutil.rmtree(next(goldens.glob("*/*")))
    spoil_lock(lock_path(goldens), change)
    with pytest.raises(LockInvalid, match="is not a valid lock"):
        pull(goldens, Counting())
    assert contents(goldens) == {}


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["sets"][0].update(golden_version=7),
        lambda c: c["sets"][0].update(checkpoint="owner/other"),
        lambda c: c["sets"][0].update(device="cuda"),
        lambda c: c["sets"][0]["files"].pop("taps.safetensors"),
        lambda c: c["sets"][0]["files"]["forward.safetensors"].update(size=5),
        lambda c: c["sets"][0]["files"].update(
            {"more.safetensors": c["sets"][0]["files"]["taps.safetensors"]}
        ),
    ],
    ids=["version", "checkpoint", "device", "fewer files", "size", "more files"],
)
def test_a_lock_and_a_manifest_that_disagree_are_refused(
    goldens: Path, elsewhere: Path, folder: Place, change: Any
) -> None:
    """The manifest that the lock's digest names must be that set's, file by file."""
    push(goldens, Counting(), remote=folder.url)
    spoil_lock(lock_path(goldens), change)
    give_lock(goldens, elsewhere)
    with pytest.raises(GoldenDamaged, match="is another set's"):
        pull(elsewhere, Counting())
    assert contents(elsewhere) == {}


@pytest.mark.parametrize(
    "url",
    [
        "goldens", "/folder", "file:folder", "file://host/folder", "file:///a/../b", "file:///..",
        "file:///a\x1b[2J", "simplecache::s3://bucket/x", "s3://key:secret@bucket/x", "s3://",
        "s3://Bucket", "s3://bucket/../x", "s3://bucket/x?y=1", "s3://bucket//x", "http://host/x",
        "hf://owner/name", "hf://datasets/owner", "hf://datasets/owner/name/../..",
        "hf://datasets/owner/name@ref", "hf://datasets/-x/name", "github://a:b@/x", "zip://x.zip",
        "hf://datasets/owner/name\nx", "",
    ],
)  # fmt: skip
def test_a_hostile_remote_is_refused(goldens: Path, url: str) -> None:
    """On the command line as in the lock: three forms, no passwords, no way up."""
    with pytest.raises(UsageError, match="unsupported remote URL"):
        clean_remote(url)
    with pytest.raises(UsageError):
        push(goldens, Counting(), remote=url)
    assert not lock_path(goldens).exists()


def test_an_object_that_grows_without_end_is_not_read_to_its_end(
    goldens: Path, elsewhere: Path, folder: Place
) -> None:
    """No more than the locked size is fetched."""
    push(goldens, Counting(), remote=folder.url)
    give_lock(goldens, elsewhere)
    name = next(name for name in folder.objects if name.endswith(".json"))
    size = len(folder.objects[name])
    folder.objects[name] = folder.objects[name] + b" " * 10_000_000
    pull(elsewhere, Counting())
    (manifest,) = elsewhere.glob("*/*/*/manifest.json")
    assert manifest.stat().st_size == size


def test_without_a_lock_nothing_is_pulled_or_guessed(goldens: Path, tmp_path: Path) -> None:
    """Both commands say what is missing."""
    with pytest.raises(GoldenNotFound, match=r"goldens\.lock is missing"):
        pull(goldens, Counting(), remote=f"file://{tmp_path}")
    with pytest.raises(UsageError, match="which names the remote"):
        push(goldens, Counting())
    with pytest.raises(SnapError):
        push(tmp_path / "none", Counting(), remote=f"file://{tmp_path}/x")
