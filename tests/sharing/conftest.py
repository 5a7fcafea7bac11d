"""Real remotes on this machine: a folder, an S3 server on loopback, a hub on loopback."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from tests.sharing.hub import DATASET, serve_dataset

BUCKET = "goldens"


class Folder(MutableMapping[str, bytes]):
    """The files below a folder, by relative path."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __getitem__(self, name: str) -> bytes:
        return (self._folder / name).read_bytes()

    def __setitem__(self, name: str, data: bytes) -> None:
        (self._folder / name).write_bytes(data)

    def __delitem__(self, name: str) -> None:
        (self._folder / name).unlink()

    def __iter__(self) -> Iterator[str]:
        files = (path for path in self._folder.rglob("*") if path.is_file())
        return (path.relative_to(self._folder).as_posix() for path in files)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class Bucket(MutableMapping[str, bytes]):
    """The objects of a bucket below a prefix, by the rest of their keys."""

    def __init__(self, endpoint: str, prefix: str) -> None:
        self._client: Any = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
        self._prefix = prefix

    def __getitem__(self, name: str) -> bytes:
        answer = self._client.get_object(Bucket=BUCKET, Key=f"{self._prefix}/{name}")
        data: bytes = answer["Body"].read()
        return data

    def __setitem__(self, name: str, data: bytes) -> None:
        self._client.put_object(Bucket=BUCKET, Key=f"{self._prefix}/{name}", Body=data)

    def __delitem__(self, name: str) -> None:
        self._client.delete_object(Bucket=BUCKET, Key=f"{self._prefix}/{name}")

    def __iter__(self) -> Iterator[str]:
        answer = self._client.list_objects_v2(Bucket=BUCKET, Prefix=f"{self._prefix}/")
        return (item["Key"].removeprefix(f"{self._prefix}/") for item in answer.get("Contents", []))

    def __len__(self) -> int:
        return sum(1 for _ in self)


@dataclass(frozen=True, slots=True)
class Place:
    """A remote: its address, one where nothing is, and its objects, to be looked at and spoilt."""

    url: str
    nowhere: str
    objects: MutableMapping[str, bytes]


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """Run moto's S3 server on loopback."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_credentials(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Point the environment at the S3 server, with one bucket that exists."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    client: Any = boto3.client("s3", endpoint_url=s3_endpoint)
    client.create_bucket(Bucket=BUCKET)
    return s3_endpoint


@pytest.fixture
def s3(s3_credentials: str, tmp_path: Path) -> Place:
    """Return a prefix of its own in the bucket."""
    prefix = f"team/{tmp_path.name}"
    objects = Bucket(s3_credentials, prefix)
    return Place(f"s3://{BUCKET}/{prefix}", "s3://no-such-bucket/goldens", objects)


@pytest.fixture
def folder(tmp_path: Path) -> Place:
    """Return a folder on this machine."""
    place = tmp_path / "shared folder"
    (tmp_path / "a-file").touch()
    nowhere = f"file://{tmp_path}/a-file/below"
    return Place(f"file://{place}", nowhere, Folder(place))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """Return a dataset repository on a hub on loopback."""
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    files: dict[str, bytes] = {}
    with serve_dataset(files) as endpoint:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr(
            "huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE",
            endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        )
        url = f"hf://datasets/{DATASET}/snap"
        yield Place(url, "hf://datasets/owner/nothing", _Below(files, "snap/"))


class _Below(MutableMapping[str, bytes]):
    """The part of a mapping whose keys begin with a prefix."""

    def __init__(self, files: dict[str, bytes], prefix: str) -> None:
        self._files, self._prefix = files, prefix

    def __getitem__(self, name: str) -> bytes:
        return self._files[self._prefix + name]

    def __setitem__(self, name: str, data: bytes) -> None:
        self._files[self._prefix + name] = data

    def __delitem__(self, name: str) -> None:
        del self._files[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        found = [name for name in self._files if name.startswith(self._prefix)]
        return (name.removeprefix(self._prefix) for name in found)

    def __len__(self) -> int:
        return sum(1 for _ in self)


@pytest.fixture(params=["folder", "s3", "hub"])
def place(request: pytest.FixtureRequest) -> Place:
    """Return each kind of remote in turn."""
    found: Place = request.getfixturevalue(request.param)
    return found
