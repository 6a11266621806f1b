"""A run whose results lie in an object store: a server that speaks S3's protocol (moto), in a process of its own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

import pytest
from pyarrow import fs

from bopo_ray.errors import StoreError
from bopo_ray.pipeline.shared import OWNER, SharedFolder
from tests.integration.conftest import TOY, Frontier, wait_for

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]
KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
BUCKET = "bucket"


@dataclass
class Store:
    """The server, and the way there."""

    port: int

    @property
    def files(self) -> fs.S3FileSystem:
        """Its buckets."""
        return fs.S3FileSystem(
            endpoint_override=f"127.0.0.1:{self.port}", scheme="http", region="us-east-1",
            allow_bucket_creation=True, allow_bucket_deletion=True,
        )  # fmt: skip

    def uri(self, name: str) -> str:
        """Of folder `name` in the bucket."""
        return f"s3://{BUCKET}/{name}?{urlencode({'endpoint_override': f'127.0.0.1:{self.port}', 'scheme': 'http'})}"

    def names(self, folder: str) -> set[str]:
        """Of the files in it."""
        found = self.files.get_file_info(fs.FileSelector(f"{BUCKET}/{folder}", recursive=True, allow_not_found=True))
        return {f.path.removeprefix(f"{BUCKET}/{folder}/") for f in found if f.type == fs.FileType.File}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = tmp_path_factory.mktemp("store") / "said"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with said.open("wb") as out:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    patch = pytest.MonkeyPatch()
    for variable, value in KEYS.items():
        patch.setenv(variable, value)
    try:
        wait_for(lambda: f"127.0.0.1:{port}" in said.read_text(), server)
        found = Store(port)
        found.files.create_dir(BUCKET)
        yield found
    finally:
        patch.undo()
        server.kill()
        server.wait()


@dataclass
class Afar(Frontier):
    """A run whose `--out` is a URI; its folder stands for the machine."""

    uri: str = ""

    @property
    def out(self) -> Path:
        (found,) = (self.folder / "results" / "shared").iterdir()
        return found

    @property
    def arguments(self) -> list[str]:
        return [*self.options, "--out", self.uri]


def remove(folder: Path) -> bool:
    """Whether it is gone: processes of a killed run may write there until they notice that it is dead."""
    shutil.rmtree(folder, ignore_errors=True)
    return not folder.exists()


def test_a_run_in_a_bucket_goes_on_where_the_machine_was_lost(store: Store, tmp_path: Path, toy_run: Frontier) -> None:
    machines = [tmp_path / name for name in ("one", "two")]
    for machine in machines:
        machine.mkdir()
    first, second = (Afar(machine, TOY, cwd=machine, uri=store.uri("run")) for machine in machines)
    process = first.start(hold=40)  # the boundaries are 24
    wait_for(lambda: any(name.startswith("episodes/boundary/") for name in store.names("run")), process)
    wait_for(first.held, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    saved = {name for name in store.names("run") if name.startswith("episodes/")}
    wait_for(lambda: remove(first.folder))

    assert second.run("--resume") == 0, second.said()
    said = " ".join(second.said("stdout").split())
    assert f"copied to {store.uri('run')}" in said
    there = store.names("run")
    assert there >= saved | {"report.html", "frontier.csv", "frontier.png", "calls.db", "spend.db", OWNER}
    assert not {name for name in there if name.endswith((".tmp", ".lock", "-wal"))}
    for name in ("boundary", "policy", "evaluation"):
        assert second.rows(name) == toy_run.rows(name)
    here = second.out / "frontier.csv"
    assert here.read_text() == (toy_run.out / "frontier.csv").read_text()
    with store.files.open_input_stream(f"{BUCKET}/run/frontier.csv") as file:
        assert file.read() == here.read_bytes()


def test_what_is_deleted_here_goes_there_and_large_files_arrive_whole(store: Store, tmp_path: Path) -> None:
    here = tmp_path / "here"
    (here / "a").mkdir(parents=True)
    large = os.urandom(12_000_000)  # in several parts
    (here / "a" / "large").write_bytes(large)
    (here / "gone").write_text("x")
    folder = SharedFolder(store.uri("plain"), here)
    folder.save()
    (here / "gone").unlink()
    folder.save(last=True)
    assert store.names("plain") == {"a/large", OWNER}
    there = tmp_path / "there"
    SharedFolder(store.uri("plain"), there)
    assert (there / "a" / "large").read_bytes() == large and not (there / "gone").exists()


def test_a_store_that_goes_away_is_one_line_and_nothing_here_is_lost(store: Store, tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "ledger.json").write_text("{}")
    folder = SharedFolder(store.uri("away"), here)
    store.files.delete_dir(BUCKET)
    try:
        with pytest.raises(StoreError, match=r"can't be copied to s3://.*--resume") as error:
            folder.save()
    finally:
        store.files.create_dir(BUCKET)
    assert "\n" not in str(error.value) and (here / "ledger.json").read_text() == "{}"
    folder.save(last=True)
    assert store.names("away") == {"ledger.json", OWNER}
