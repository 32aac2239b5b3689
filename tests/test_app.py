"""The page in a real browser: classification, search, bad uploads, and which files and hosts it gives access to."""

import base64
import contextlib
import importlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.testing.range_server import serve
from zslflax.app import check_port
from zslflax.data import preprocess
from zslflax.data.sources import shapes
from zslflax.data.sources.opening import open_source
from zslflax.errors import MissingLibraryError, UserError
from zslflax.inference.predictor import Predictor
from zslflax.inference.test_names import read_test_names, write_test_names

# The command, which reports every host that it connects to.
PROGRAM = """
import sys
def watch(event, args):
    if event in ("socket.getaddrinfo", "socket.connect"):
        host = args[0] if event == "socket.getaddrinfo" else args[1][0]
        if str(host) not in ("127.0.0.1", "localhost"):
            print("CONNECTED", host, file=sys.stderr, flush=True)
sys.addaudithook(watch)
from zslflax import app
app.main()
"""
DROP = """
const [zone, name, content] = arguments, data = new DataTransfer();
data.items.add(new File([Uint8Array.from(atob(content), c => c.charCodeAt(0))], name, {type: "image/png"}));
for (const kind of ["dragenter", "dragover", "drop"])
    zone.dispatchEvent(new DragEvent(kind, {dataTransfer: data, bubbles: true, cancelable: true}));
"""
TIMEOUT = 120  # seconds
CONTROL, DELETE, NO_KEY = "\ue009", "\ue017", "\ue000"  # keys as WebDriver writes them


def installed(program: str) -> str:
    """The path of a program. Without the program the test is skipped, or fails in CI."""
    path = shutil.which(program)
    if path is None and not os.environ.get("CI"):
        pytest.skip(f"{program} is not installed")
    assert path, f"{program} is not installed: apt-get install chromium chromium-driver"
    return path


@pytest.fixture(scope="module")
def served(require, learned_workdir, tmp_path_factory):
    """The page of a small run, with a folder of images and two other files."""
    require("gradio")
    home = tmp_path_factory.mktemp("served")
    folder = home / "images"
    (folder / "more").mkdir(parents=True)
    predictor = Predictor.restore(learned_workdir)
    test = open_source("shapes", predictor.config.data, "test")
    for i in range(20):
        Image.fromarray(preprocess.record_image(test[i])).save(folder / ("more" if i % 2 else ".") / f"{i:02d}.png")
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("nothing")
    Image.new("RGB", (16, 16), "red").save(home / "outside.png")
    (folder / "link.png").symlink_to(home / "outside.png")
    os.mkfifo(folder / "pipe.png")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    workdir = shutil.copytree(learned_workdir, home / "run")
    write_test_names(workdir, {"test": ["red circle", "blue fish", "a crane, a bird"]})
    command = [sys.executable, "-c", PROGRAM, f"--workdir={workdir}", f"--images={folder}", f"--port={port}"]
    variables = os.environ | {"JAX_PLATFORMS": "cpu", "GRADIO_TEMP_DIR": str(home / "uploads")}
    log = home / "log"
    with open(log, "w") as file, subprocess.Popen(command, stdout=file, stderr=file, env=variables) as process:
        try:
            wait(lambda: process.poll() is not None or "the page is at" in log.read_text())
            assert process.poll() is None, log.read_text()
            url = f"http://127.0.0.1:{port}/"
            assert f"the page is at {url}" in log.read_text()
            yield SimpleNamespace(url=url, port=port, log=log, home=home, folder=folder, predictor=predictor)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def browser(require):
    webdriver = require("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = installed("chromium")
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1200,1200"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    service = webdriver.ChromeService(installed("chromedriver"))
    with webdriver.Chrome(options=options, service=service) as chrome:
        yield chrome


@pytest.fixture
def page(served, browser):
    browser.get(served.url)
    wait(lambda: browser.find_elements("css selector", "#upload input[type=file]"))
    wait(lambda: browser.find_elements("css selector", "#names textarea"))
    return browser


def wait(condition):
    """Waits until the condition is true, and returns its value."""
    end = time.monotonic() + TIMEOUT
    while not (value := condition()):
        assert time.monotonic() < end, "the condition did not become true in time"
        time.sleep(0.1)
    return value


def each(browser, selector: str, what: str) -> list:
    """A property of all elements that match, read at one moment, because the page may be redrawn at any time."""
    script = f"return [...document.querySelectorAll(arguments[0])].map(element => element.{what})"
    return browser.execute_script(script, selector)


def texts(browser, selector: str) -> list[str]:
    return [text.strip() for text in each(browser, selector, "innerText")]


def type_names(browser, names: str):
    """Replaces the class names on the page."""
    box = browser.find_element("css selector", "#names textarea")
    box.send_keys(f"{CONTROL}a{NO_KEY}{DELETE}{names}")


def drop(browser, path):
    zone = browser.find_element("css selector", "#upload button")
    browser.execute_script(DROP, zone, path.name, base64.b64encode(path.read_bytes()).decode())


def message(browser) -> str:
    """Returns the message on the page, and closes it."""
    (text,) = wait(lambda: [text for text in texts(browser, ".toast-body") if text])
    each(browser, ".toast-close", "click()")
    wait(lambda: not texts(browser, ".toast-body"))
    return text


def test_a_missing_library_is_named_with_its_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    for module in ("zslflax.app", "zslflax.page"):  # a new process has imported neither
        monkeypatch.delitem(sys.modules, module, raising=False)
    app = importlib.import_module("zslflax.app")
    monkeypatch.setattr(sys, "argv", ["app", f"--model={tmp_path}"])
    with pytest.raises(MissingLibraryError, match=r'gradio.*; pip install "zslflax\[app\]"'):
        app.main()
    monkeypatch.setattr(sys, "argv", ["app", "--help"])
    with pytest.raises(SystemExit):
        app.main()
    assert "usage: zslflax app" in capsys.readouterr().out


def test_an_image_is_classified_after_a_drop_and_after_a_click(page, served):
    names = ["red circle", "<b>bold</b> star", "/etc/hostname", "blue fish"]
    image = served.folder / "04.png"
    type_names(page, ", ".join([*names, " ", names[0]]))
    drop(page, image)
    scores = wait(lambda: texts(page, "#scores .score"))
    (expected,) = served.predictor.classify(image, names)
    scores = list(map(float, scores))
    assert dict(zip(texts(page, "#scores .name"), scores)) == pytest.approx(dict(expected), abs=1e-3)
    assert scores == sorted(scores, reverse=True)
    lengths = each(page, "#scores .bar", "offsetWidth")
    assert len(lengths) == 4 and lengths == sorted(lengths, reverse=True) and lengths[0] > 100
    wait(lambda: each(page, "#shown img", "naturalWidth") == [256])  # 16 pixels, enlarged

    type_names(page, "a heart\na ring")
    page.find_element("css selector", "#classify").click()
    wait(lambda: sorted(texts(page, "#scores .name")) == ["a heart", "a ring"])


def test_a_sentence_finds_the_best_images(page, served):
    query = page.find_element("css selector", "#query textarea, #query input")
    query.send_keys("a red star\n")
    captions = wait(lambda: texts(page, "#found .caption-label"))
    paths = sorted(served.folder.rglob("*.png"))
    for name in ("broken.png", "link.png", "pipe.png"):
        paths.remove(served.folder / name)
    expected = served.predictor.search("a red star", paths, top_k=len(paths))
    by_name = {paths[i].name: score for i, score in expected}
    found = [re.fullmatch(r"(-?\d\.\d{3})\s+(\S+)", caption).groups() for caption in captions]
    names, scores = [name for _, name in found], [float(score) for score, _ in found]
    assert len(set(names)) == 12 and len(by_name) == 20
    np.testing.assert_allclose(scores, [by_name[name] for name in names], atol=1e-3)
    np.testing.assert_allclose(scores, [score for _, score in expected[:12]], atol=1e-3)  # best first
    assert "left out" in served.log.read_text() and "broken.png" in served.log.read_text()
    assert "20 of 22 images" in served.log.read_text() and "link.png" not in served.log.read_text()
    assert "pipe.png is no regular file" in served.log.read_text()

    before = texts(page, "#found .caption-label")
    query.clear()
    query.send_keys("a blue square")
    page.find_element("css selector", "#search").click()
    wait(lambda: texts(page, "#found .caption-label") not in ([], before))


def test_the_page_fits_a_phone(page, served):
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        drop(page, served.folder / "04.png")
        type_names(page, "red circle, blue fish")
        page.find_element("css selector", "#classify").click()
        wait(lambda: texts(page, "#scores .probability"))
        page.find_element("css selector", "#query textarea, #query input").send_keys("a red star\n")
        wait(lambda: len(texts(page, "#found .caption-label")) == 12)
        assert page.execute_script("return document.documentElement.scrollWidth") <= 390
        assert len(set(each(page, "#found .thumbnail-item", "getBoundingClientRect().left"))) == 3
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_scores_are_explained_with_probabilities(page, served):
    type_names(page, "red circle, blue fish, a heart")
    drop(page, served.folder / "04.png")
    wait(lambda: texts(page, "#scores .probability"))
    (expected,) = served.predictor.classify(
        served.folder / "04.png", ["red circle", "blue fish", "a heart"], probabilities=True
    )
    assert texts(page, "#scores .probability") == [f"{probability:.0%}" for *_, probability in expected]
    assert "if exactly one of the names fits" in texts(page, "#scores .explained")[0]


def test_the_page_starts_with_the_class_names_of_the_runs_own_test_set(page, served):
    box = page.find_element("css selector", "#names textarea")
    assert box.get_attribute("value") == "red circle, blue fish"  # a name with a comma would become two
    drop(page, served.folder / "04.png")
    wait(lambda: sorted(texts(page, "#scores .name")) == ["blue fish", "red circle"])


def test_a_run_and_its_export_keep_the_class_names_of_test_sets(tiny_config, finished_workdir, tmp_path):
    assert read_test_names(finished_workdir) == shapes.CLASS_NAMES
    write_test_names(tmp_path, {"many": [str(i) for i in range(1_001)], "none": []})
    assert read_test_names(tmp_path) == []


def test_bad_uploads_get_a_message_and_the_server_continues(page, served, tmp_path):
    (tmp_path / "large.png").write_bytes(bytes(21 << 20))
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "cut.png").write_bytes((served.folder / "00.png").read_bytes()[:200])
    (tmp_path / "notes.txt").write_text("nothing")
    Image.new("1", (1 << 14, (1 << 12) + 1)).save(tmp_path / "wide.png")
    page.find_element("css selector", "#classify").click()
    assert "Drop an image first" in message(page)
    expected = {
        "large.png": 'exceed the maximum allowed size of 20.0 Mb: "large.png"',
        "broken.png": "This file can't be used: the data is not an image",
        "cut.png": "This file can't be used: the image cannot be decoded",
        "notes.txt": "Invalid file type: notes.txt",
        "wide.png": "16384 × 4097 pixels, more than the 16,777,216 allowed here",
    }
    for name, words in expected.items():
        page.get(served.url)
        wait(lambda: page.find_elements("css selector", "#upload input[type=file]"))
        page.find_element("css selector", "#upload input[type=file]").send_keys(str(tmp_path / name))
        assert words in message(page)
        assert texts(page, "#scores .name") == []
    page.get(served.url)
    wait(lambda: page.find_elements("css selector", "#upload input[type=file]"))
    wait(lambda: page.find_elements("css selector", "#names textarea"))
    type_names(page, "")
    drop(page, served.folder / "00.png")
    wait(lambda: texts(page, "#scores") == ["Type class names, with commas between them."])
    type_names(page, "x" * 501)
    page.find_element("css selector", "#classify").click()
    assert "At most 1,000 class names of 500 characters" in message(page)
    assert "Traceback" not in served.log.read_text()


def ask(url: str, data: bytes | None = None, kind: str = "application/json", **headers: str) -> tuple[int, str]:
    request = urllib.request.Request(url, data, ({"Content-Type": kind} if data else {}) | headers)
    with contextlib.ExitStack() as stack:
        try:
            answer = stack.enter_context(urllib.request.urlopen(request, timeout=TIMEOUT))
        except urllib.error.HTTPError as error:
            answer = stack.enter_context(error)
        return answer.status, answer.read().decode(errors="replace")


def test_no_file_is_served_or_read_by_its_path(served):
    secret = served.home / "secret.png"
    shutil.copyfile(served.folder / "00.png", secret)
    for path in (secret, served.folder / "00.png", "/etc/passwd", "setup.py"):
        assert ask(f"{served.url}gradio_api/file={path}")[0] in (403, 404)
    for path in (secret, served.folder / "00.png"):
        data = {"data": [{"path": str(path), "meta": {"_type": "gradio.FileData"}}, "a cat, a dog"]}
        status, answer = ask(f"{served.url}gradio_api/call/classify", json.dumps(data).encode())
        assert status == 200
        status, answer = ask(f"{served.url}gradio_api/call/classify/{json.loads(answer)['event_id']}")
        assert "event: error" in answer and "a cat" not in answer
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    body = head + bytes(21 << 20) + b"\r\n--x--\r\n"
    assert ask(f"{served.url}gradio_api/upload", body, "multipart/form-data; boundary=x")[0] == 413


def call(served, function: str, *arguments, **headers) -> str:
    """What a function of the page answers, as text."""
    status, answer = ask(f"{served.url}gradio_api/call/{function}", json.dumps({"data": arguments}).encode(), **headers)
    assert status == 200, answer
    return ask(f"{served.url}gradio_api/call/{function}/{json.loads(answer)['event_id']}")[1]


def upload(served, *contents: bytes, name: str = "a.png") -> tuple[int, str]:
    parts = [
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="%s"\r\n\r\n' % name.encode() + content
        for content in contents
    ]
    body = b"\r\n".join(parts) + b"\r\n--x--\r\n"
    return ask(f"{served.url}gradio_api/upload", body, "multipart/form-data; boundary=x")


def test_a_foreign_host_or_origin_gets_no_answer(served):
    own = f"127.0.0.1:{served.port}"
    for host in (own, f"localhost:{served.port}"):
        assert ask(served.url, Host=host)[0] == 200
        assert ask(served.url, Host=host, Origin=f"http://{host}")[0] == 200
    for host in ("evil.example", f"evil.example:{served.port}", "127.0.0.1.evil.example", "192.168.0.7", ""):
        status, answer = ask(served.url, Host=host)
        assert status == 403 and "this server is not" in answer
        assert (
            ask(f"{served.url}gradio_api/call/search", b'{"data": ["a"]}', Host=host, Origin=f"http://{host}")[0] == 403
        )
    for origin in ("http://evil.example", "null", f"http://127.0.0.1:{served.port + 1}"):
        status, answer = ask(f"{served.url}gradio_api/call/search", b'{"data": ["a"]}', Host=own, Origin=origin)
        assert status == 403 and "may not use this server" in answer


def test_large_bodies_are_refused_whatever_length_they_declare(served):
    status, answer = ask(f"{served.url}gradio_api/call/search", b'{"data": ["' + bytes(3 << 20) + b'"]}')
    assert status == 413 and "at most 2,097,152 bytes" in answer
    assert upload(served, *[bytes(8 << 20)] * 3)[0] == 413
    with socket.create_connection(("127.0.0.1", served.port), timeout=TIMEOUT) as connection:
        head = f"POST /gradio_api/call/search HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\n"
        head += "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head.encode())
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(64):
                connection.sendall(b"100000\r\n" + bytes(1 << 20) + b"\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(100).startswith(b"HTTP/1.1 413")
    assert "event: complete" in call(served, "search", "a red star")


def test_an_upright_photo_and_one_that_is_stored_sideways_get_the_same_answer(served):
    stored, exif = Image.open(served.folder / "00.png").transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    stored.save(buffer, "PNG", exif=exif)
    answers = []
    for content in ((served.folder / "00.png").read_bytes(), buffer.getvalue()):
        (path,) = json.loads(upload(served, content)[1])
        answer = call(served, "classify", {"path": path, "meta": {"_type": "gradio.FileData"}}, "red circle, a fish")
        answers.append(re.findall(r"-?\d\.\d{3}<", answer))
    assert answers[0] == answers[1] and len(answers[0]) == 2


def test_large_images_are_refused_before_they_are_decoded(served):
    buffer = io.BytesIO()
    Image.new("RGB", (8192, 8192)).save(buffer, "PNG")
    assert buffer.tell() < 20 << 20
    (path,) = json.loads(upload(served, buffer.getvalue())[1])
    start = time.monotonic()
    for _ in range(12):
        answer = call(served, "classify", {"path": path, "meta": {"_type": "gradio.FileData"}}, "a, b")
        assert (
            "event: error" in answer
            and "8192 × 8192 pixels, more than the 16,777,216" in json.loads(answer.partition("data: ")[2])["error"]
        )
    assert time.monotonic() - start < 30


def test_an_image_that_is_removed_or_replaced_after_the_start_is_left_out(served):
    whole = re.findall(r"  (\d\d\.png)", call(served, "search", "a red star"))
    first, second = (next(served.folder.rglob(name)) for name in whole[:2])
    saved = [(path, path.read_bytes()) for path in (first, second)]
    first.unlink()
    second.unlink()
    second.symlink_to(served.home / "outside.png")
    try:
        left = re.findall(r"  (\d\d\.png)", call(served, "search", "a red star"))
    finally:
        for path, content in saved:
            path.unlink(missing_ok=True)
            path.write_bytes(content)
    assert len(left) == 12 and left[:10] == whole[2:]
    assert f"there is no file {first}" in served.log.read_text()
    assert f"{second} now leads out of the folder" in served.log.read_text()


def test_it_connects_to_no_other_host_and_answers_this_machine_only(page, served):
    asked = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked = [event["params"] for event in asked if event["method"] == "Network.requestWillBeSent"]
    urls = [event["request"]["url"] for event in asked]
    assert len(urls) > 10
    assert [url for url in urls if not url.startswith((served.url, "data:", f"blob:{served.url}"))] == []
    assert "CONNECTED" not in served.log.read_text()
    with pytest.raises(OSError), socket.create_connection(("127.0.0.2", served.port), timeout=5):
        pass


def test_a_proxy_is_not_asked_for_the_page_itself(monkeypatch, tmp_path, require):
    httpx, page = require("httpx"), require("zslflax.page")
    (tmp_path / "a.txt").write_text("here")
    monkeypatch.setenv("no_proxy", "example.org")
    monkeypatch.setenv("NO_PROXY", "")
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing answers there
    page.exempt_from_proxy("127.0.0.1", "localhost")
    assert os.environ["no_proxy"] == "example.org,127.0.0.1,localhost"
    with serve(tmp_path) as server:
        assert httpx.get(f"{server.url}/a.txt").text == "here"
        monkeypatch.delenv("no_proxy")
        monkeypatch.delenv("NO_PROXY")
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/a.txt")


def test_a_port_that_cannot_be_used_is_refused_by_its_number():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=f"--port={port} cannot be used: Address already in use; choose another"):
            check_port(port)
    with pytest.raises(UserError, match="--port=80000 cannot be used: .* choose another"):
        check_port(80_000)
