"""Images of untrusted rows: only local files and files of the Hub are opened, and no row ends the run."""

import errno
import io
import os
import signal
import tarfile
import threading
import traceback
import zipfile
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import datasets
import fsspec
import pytest
from PIL import Image
from tiny_pairs import png
from torch.utils.data import DataLoader

from trl_diffusion_sdpo.data import (
    PairOptions,
    PairTransform,
    UndecodableImageError,
    decode_image,
    images,
    prepare_dataset,
)
from trl_diffusion_sdpo.data.images import ImageReader, UnreadableImageError


@pytest.fixture
def soon():
    """Fails a test that blocks."""

    def late(*_):
        raise AssertionError("it waited")

    previous = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


@pytest.fixture
def web():
    """A local server with one image at every path. `asked` are the requested paths."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked.append(self.path)
            self.send_response(302 if self.server.redirect else 200)
            if self.server.redirect:
                self.send_header("Location", self.server.redirect)
            self.send_header("Content-Length", str(len(png())))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(png())

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.redirect = [], ""
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_urls_in_rows_do_not_reach_other_hosts_by_default(web, soon):
    host = f"127.0.0.1:{web.server_address[1]}"
    for address in (
        f"http://{host}/a.png",
        f"webhdfs://{host}/a.png",
        f"zip://a.png::http://{host}/a.zip",
        f"simplecache::http://{host}/a.png",
        f"filecache::zip://a.png::http://{host}/a.zip",
        f"github://owner:repo@{host}/a.png",
    ):
        with pytest.raises(UndecodableImageError, match="rows may not use"):
            decode_image(address)
    assert web.asked == []


@pytest.mark.parametrize(
    "address", ["/proc/self/mem", "file:///proc/self/mem", "zip://a.png::/proc/self/mem", "/sys/class/net/lo/speed"]
)
def test_a_file_of_the_system_is_a_bad_row(address, soon):
    for read in (ImageReader().decode, ImageReader().size):
        with pytest.raises(UndecodableImageError, match="system"):
            read(address)


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://host/a.png", "loop"])
def test_a_redirect_that_leads_nowhere_is_a_bad_row(web, soon, target):
    pytest.importorskip("aiohttp")
    address = f"http://127.0.0.1:{web.server_address[1]}/a.png"
    web.redirect = address if target == "loop" else target
    with pytest.raises(UndecodableImageError):
        ImageReader(("http",)).decode(address)


def test_allowed_schemes_are_opened():
    with fsspec.open("memory://a.png", "wb") as file:
        file.write(png(7))
    rows = [{"prompt": "a", "chosen": "memory://a.png", "rejected": png(9)}]
    prepared = prepare_dataset(rows, PairOptions(PairTransform(16), image_schemes=("memory",)))
    assert prepared[0]["pixel_values"][:, 0, 0, 0].tolist() == [7, 9]
    with pytest.raises(ValueError, match="No pair is left"):
        prepare_dataset(rows, PairOptions(PairTransform(16)))


def test_an_unknown_scheme_is_refused():
    assert images.parse_schemes(None) == images.parse_schemes([]) == ()
    with pytest.raises(ValueError, match="`image_schemes`.*'memroy'"):
        images.parse_schemes(["memroy"])


PASSWORD = "hunter2secret"


def test_passwords_of_urls_are_in_no_message(caplog, monkeypatch):
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    url = f"flaky://me:{PASSWORD}@host/a.png?token={PASSWORD}"
    rows = [{"prompt": "a", "chosen": url, "rejected": png(9)}, {"prompt": "b", "chosen": png(1), "rejected": png(9)}]
    for error, schemes in ((FileNotFoundError(url), ("flaky",)), (FileNotFoundError(url), ())):
        monkeypatch.setattr(Flaky, "error", error, raising=False)
        monkeypatch.setattr(images.fsspec, "available_protocols", lambda: ["flaky"])
        prepared = prepare_dataset(rows, PairOptions(PairTransform(16), image_schemes=schemes))
        assert prepared.report.undecodable == 1 and "flaky://" in str(prepared.report)
        assert PASSWORD not in str(prepared.report) + caplog.text
    monkeypatch.setattr(Flaky, "error", TimeoutError(url), raising=False)
    with pytest.raises(UnreadableImageError, match="flaky://") as caught:
        ImageReader(("flaky",)).decode(url)
    shown = "".join(traceback.format_exception(caught.value))
    assert PASSWORD not in shown.replace(f"decode({url!r})", "")


@pytest.mark.parametrize("suffix", ["GZ", "xz"])
def test_compressed_archives_are_refused(suffix, tmp_path):
    path = tmp_path / f"a.tar.{suffix}"
    with tarfile.open(path, f"w:{suffix.lower()}") as archive:
        info = tarfile.TarInfo("a.png")
        info.size = len(png())
        archive.addfile(info, io.BytesIO(png()))
    for address in (f"tar://a.png::{path}", f"tar://a.png::file://{path}"):
        with pytest.raises(UndecodableImageError, match="compressed archive"):
            decode_image(address)


def test_pipes_devices_and_folders_are_not_opened(tmp_path, soon):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe.png", "/dev/zero", tmp_path / "link.png", tmp_path):
        for spelling in (str(path), f"file://{path}", f"zip://a.png::{path}", f"zip://a.png::file://{path}"):
            with pytest.raises(UndecodableImageError, match="not a regular file"):
                decode_image(spelling)


def test_large_files_are_refused_before_they_are_read(tmp_path):
    large = tmp_path / "large.png"
    with large.open("wb") as file:
        file.truncate(images.MAX_FILE_BYTES + 1)  # holds no blocks
    with pytest.raises(UndecodableImageError, match=f"{images.MAX_FILE_BYTES + 1} bytes"):
        decode_image(str(large))


def test_members_of_archives_are_read_up_to_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_FILE_BYTES", 10_000)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(10_001))
    assert (tmp_path / "bomb.zip").stat().st_size < 500
    with pytest.raises(UndecodableImageError, match="more than 10000 bytes"):
        decode_image(f"zip://a.png::{tmp_path}/bomb.zip")


def test_pixels_are_counted_before_they_are_decoded_whatever_pillow_allows(monkeypatch):
    """Pillow's limit can be disabled."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setattr(images, "MAX_PIXELS", 16 * 16)
    assert decode_image(png()).size == (16, 16)
    cut_off = png(size=(16, 17))[:60]  # decoding would fail otherwise
    with pytest.raises(UndecodableImageError, match="16x17 is too large: 256 pixels at most"):
        decode_image(cut_off)


class Flaky(fsspec.AbstractFileSystem):
    """A storage on which nothing can be opened at the moment."""

    protocol = "flaky"
    error: Exception

    def _open(self, path, mode="rb", **options):
        raise self.error


def kind_of(path, schemes=("file", "zip")):
    with pytest.raises(ValueError) as caught:
        ImageReader(schemes).decode(str(path))
    return caught.type


class AnswerError(Exception):
    """The error of an HTTP library, which fsspec raises as the cause of a `FileNotFoundError`."""

    def __init__(self, status):
        self.status = status


@pytest.mark.parametrize(
    ("cause", "kind"),
    [
        (AnswerError(404), UndecodableImageError),
        (AnswerError(429), UnreadableImageError),
        (AnswerError(503), UnreadableImageError),
        (TimeoutError(), UnreadableImageError),
        (None, UndecodableImageError),
    ],
)
def test_a_storage_that_does_not_answer_is_not_a_missing_image(cause, kind, monkeypatch):
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    error = FileNotFoundError("a.png")
    error.__cause__ = cause
    monkeypatch.setattr(Flaky, "error", error, raising=False)
    assert kind_of("flaky://a.png", ("flaky",)) is kind


@pytest.fixture
def fails(monkeypatch):
    """`fails(times)`: so many readings of the file `2.png` fail as on a storage that is away for a moment."""
    left, check = [0], images.check_regular_file

    def failing(path, max_bytes):
        if left[0] and path.endswith("2.png"):
            left[0] -= 1
            raise OSError(errno.ESTALE, "stale handle")
        check(path, max_bytes)

    monkeypatch.setattr(images, "check_regular_file", failing)
    return partial(left.__setitem__, 0)


@pytest.fixture
def files(tmp_path):
    """Four pairs of files."""
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(png(level=number))
    loser = str(tmp_path / "4.png")
    return [{"prompt": "a", "chosen": str(tmp_path / f"{i}.png"), "rejected": loser} for i in range(4)]


@pytest.mark.parametrize(("workers", "streaming"), [(0, False), (1, True)])
def test_training_ends_rather_than_goes_on_without_a_pair_that_may_be_good(workers, streaming, files, fails):
    table = datasets.Dataset.from_list(files)
    source = table.to_iterable_dataset() if streaming else table
    prepared = prepare_dataset(source, PairOptions(PairTransform(16), verify_images="none"))
    loader = DataLoader(prepared, batch_size=None, num_workers=workers)
    fails(1)
    with pytest.raises(UnreadableImageError, match="2.png"):
        list(loader)
    assert prepared.report.undecodable == 0
    fails(0)  # a worker has counted in its own memory
    assert len(list(loader)) == 4


def test_damage_and_absence_do_not_pass(tmp_path):
    (tmp_path / "cut.png").write_bytes(png(size=(64, 64))[:80])
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.png", png())
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[data.index(png()) + 40] ^= 1
    (tmp_path / "a.zip").write_bytes(data)
    (tmp_path / "no.zip").write_bytes(b"no archive")
    zipped = [f"zip://a.png::{tmp_path}/a.zip", f"zip://b.png::{tmp_path}/a.zip", f"zip://a.png::{tmp_path}/no.zip"]
    for place in (tmp_path / "cut.png", tmp_path / "missing.png", tmp_path, *zipped):
        assert kind_of(place) is UndecodableImageError, place
