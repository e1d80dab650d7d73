"""visionzoo view: pictures from the command line, the page by HTTP and in a browser, and what is refused."""

import io
import json
import re
import shutil
import socket
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from engine.helpers import ROOT, run_tool
from PIL import Image
from starlette.testclient import TestClient

from visionzoo.engine import page, view
from visionzoo.engine.restoring import untrained
from visionzoo.engine.trained_flags import view_parser

SIZE = {"depth": 2, "embed_dim": 16, "num_heads": 2}
FLAGS = ["--model", "zoo_deit_t", "--num-classes", "3", "--img-size", "32", "--device", "cpu", "--random-weights"]
FLAGS += ["--model-kwargs", *(f"{key}={value}" for key, value in SIZE.items())]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def viewer():
    torch.manual_seed(0)
    config = view_parser().parse(FLAGS)
    trained = untrained(config.model, config.input, config.look)
    return view.ClassifierViewer(
        "zoo_deit_t", trained, ["cat", "<b>dog</b>", "fish"], config.look, torch.autocast("cpu", enabled=False)
    )


@pytest.fixture
def client(viewer, pictures):
    app = page.make_app(viewer, [pictures / "0.png", pictures / "gone.png"])
    return TestClient(app, base_url="http://127.0.0.1:1", raise_server_exceptions=False)


def png(side=8, kind="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(file, kind)
    return file.getvalue()


def bomb(side):
    """A PNG that says that it is large and holds nothing."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_pictures_are_written_for_each_image_and_the_mean_of_the_curves(pictures, tmp_path, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(view, "draw_prediction", lambda _image, classes, path: drawn.append((classes, path)) or set())
    mask = tmp_path / "mask.png"
    Image.fromarray(np.eye(8, dtype=np.uint8) * 255).save(mask)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/faithfulness.png").write_bytes(b"of another start")
    flags = ["--save", str(tmp_path / "out"), "--method", "rollout", "--place", "0.1", "0.9", "--mask", str(mask)]
    assert run_tool("view", str(pictures), *FLAGS, *flags, "--faithfulness") == 0
    said = capsys.readouterr().out
    assert len(re.findall(r"Attention-IoU of rollout with the mask: 0\.\d{4}", said)) == 2
    assert "attention rollout, mean of 2 images: deletion 0." in said
    assert [path.relative_to(tmp_path).as_posix() for _, path in drawn] == [f"out/{i}/predictions.png" for i in "01"]
    names = ["explanation.json", "faithfulness.png", "rollout.png"]
    for number in "01":
        assert sorted(path.name for path in (tmp_path / "out" / number).iterdir()) == names
    found = json.loads((tmp_path / "out/0/explanation.json").read_text())
    assert found["place"] == [0.1, 0.9] and len(found["classes"]) == 3
    assert found["notes"]["rollout"] == "of the place at 10% of the height, 90% of the width"
    assert Image.open(tmp_path / "out/faithfulness-1.png").width > 500
    assert (tmp_path / "out/faithfulness.png").read_bytes() == b"of another start"


def test_methods_that_fit_are_made_and_the_others_are_named_and_counted(pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(view, "draw_prediction", lambda *_: set())
    methods = ["--method", "exits", "rollout", "tokens"]
    assert run_tool("view", str(pictures), *FLAGS, "--save", str(tmp_path / "out"), *methods) == 0
    said = capsys.readouterr().out
    assert said.count("  1 of 3 methods\n  without exits: DeiT has no early exits; ") == 1  # not for each image
    assert said.count("  without tokens: DeiT as built has no reducers") == 1
    for number in "01":
        assert {path.name for path in (tmp_path / "out" / number).iterdir()} == {"explanation.json", "rollout.png"}


def test_a_mean_counts_the_images_that_have_the_map(pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(view, "draw_prediction", lambda *_: set())
    explain, seen = view.explain_image, []

    def once_less(*args, **kwargs):
        found = explain(*args, **kwargs)
        if seen:
            del found.maps["rollout"], found.curves["rollout"]
        seen.append(found)
        return found

    monkeypatch.setattr(view, "explain_image", once_less)
    methods = ["--method", "rollout", "gradient_input", "--faithfulness"]
    assert run_tool("view", str(pictures), *FLAGS, "--save", str(tmp_path / "out"), *methods) == 0
    said = capsys.readouterr().out
    assert "attention rollout, mean of 1 image:" in said and "gradients x input, mean of 2 images:" in said


def test_without_a_map_faithfulness_is_said_to_have_no_effect(pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(view, "draw_prediction", lambda *_: set())
    monkeypatch.setitem(sys.modules, "captum", None)
    methods = ["--method", "features", "gradient_input", "--faithfulness"]
    assert run_tool("view", str(pictures / "0.png"), *FLAGS, "--save", str(tmp_path / "out"), *methods) == 0
    said = capsys.readouterr().out
    assert "  1 of 2 methods\n" in said and "without --faithfulness: none of the maps rollout, " in said
    assert 'without gradient_input: captum is not installed; install it with: pip install "visionzoo[view]"' in said


@pytest.mark.parametrize(
    ("flags", "left_out"),
    [
        (["--method", "rollout", "--target", "1"], ["--target: none of gradient_input, deeplift, frequency was made"]),
        (["--method", "gradient_input", "--place", "0", "1"], ["--place: none of attended, rollout, flow was made"]),
        (["--method", "rollout", "gradient_input", "--target", "1", "--place", "0", "1"], []),
        (["--method", "rollout", "--faithfulness", "--target", "1"], []),  # of which the curves are
    ],
)
def test_a_class_and_a_place_that_no_method_looks_at_are_said(pictures, tmp_path, capsys, flags, left_out):
    assert run_tool("view", str(pictures), *FLAGS, "--save", str(tmp_path / "out"), *flags) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  without")]
    assert len(said) == len(left_out)  # once for two images
    assert all(words in line for words, line in zip(left_out, said, strict=True))


def test_a_seed_repeats_random_weights_and_amp_is_taken(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(view, "draw_prediction", lambda *_: set())
    found, dtypes = [], set()
    explain = view.explain_image

    def watched(*args, **kwargs):
        dtypes.add(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
        return explain(*args, **kwargs)

    monkeypatch.setattr(view, "explain_image", watched)
    for i, more in enumerate(([], [], ["--seed", "1"], ["--amp", "--amp-dtype", "bfloat16"])):
        out = tmp_path / str(i)
        flags = ["--save", str(out), "--method", "gradient_input", *more]
        assert run_tool("view", str(pictures / "0.png"), *FLAGS, *flags) == 0
        found.append(json.loads((out / "0/explanation.json").read_text())["classes"])
    assert found[0] == found[1] != found[2] and found[3] != found[0]
    assert dtypes == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--save", "x"], "--save: which images?"),
        (["IMAGE", "--method", "rollout"], "--method: for pictures; give --save DIR"),
        (["IMAGE", "--save", "x", "--method", "exits"], "DeiT has no early exits; zoo_dynperceiver_* have some"),
        (
            ["IMAGE", "--save", "x", "--method", "exits", "tokens"],
            "none of 2 methods can be made: exits: DeiT has no early exits; zoo_dynperceiver_* have some; tokens: ",
        ),
        (["IMAGE", "--save", "x", "--method", "features", "--faithfulness"], "they are of maps; add one of rollout"),
        (["IMAGE", "--save", "x", "--mask", "gone.png"], "--mask gone.png: [Errno 2] No such file"),
        (["IMAGE", "--save", "x", "--mask", "black.png"], "--mask black.png is black everywhere"),
        (["IMAGE", "--save", "x", "--port", "1", "--host", "::1"], "--host, --port: of the page, which --save writes"),
        (["IMAGE", "--save", "x", "--target", "3"], "target must be a class from 0 to 2, got target=3"),
        (["IMAGE", "--save", "x", "--place", "0.5", "2"], "expected a number at least 0 and at most 1, got 2"),
        (["IMAGE", "--pretrained"], "--random-weights together with --checkpoint or --pretrained; give one"),
        (["IMAGE", "--host", "203.0.113.7"], "cannot listen on 203.0.113.7, port 7860"),
        (["IMAGE", "--port", "70000"], "expected a number at least 0 and at most 65535, got 70000"),
    ],
)
def test_what_a_user_can_mend_is_one_message(pictures, tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    Image.new("L", (4, 4)).save("black.png")
    given = [str(pictures / "0.png") if flag == "IMAGE" else flag for flag in flags]
    assert run_tool("view", *given, *FLAGS) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_port_that_is_taken_is_said(viewer):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(view.UserError, match=r"another --port may do, 0 takes any"):
            page.serve(viewer, [], "127.0.0.1", taken.getsockname()[1])


def test_the_page_answers_with_classes_and_views(client):
    assert "visionzoo view" in client.get("/").text and client.get("/page.js").status_code == 200
    about = client.get("/about").json()
    assert about["title"] == "zoo_deit_t, random weights" and about["files"] == ["0.png", "gone.png"]
    assert list(about["methods"]) == list(view.METHODS)
    opened = client.post("/files/0").json()
    assert {each["name"] for each in opened["classes"]} == {"cat", "<b>dog</b>", "fish"}
    number = opened["number"]
    assert Image.open(io.BytesIO(client.get(f"/pictures/{number}").content)).size == (32, 32)
    drawn = client.get(f"/pictures/{number}/rollout?y=0.2&x=0.4")
    assert drawn.headers["content-type"] == "image/png" and Image.open(io.BytesIO(drawn.content)).width > 300
    assert drawn.headers["x-words"] == "of the place at 20% of the height, 40% of the width"
    assert "default-src 'none'" in drawn.headers["content-security-policy"]


def test_uploads_are_bounded_in_bytes_pixels_and_kinds(client, monkeypatch):
    assert client.post("/pictures", content=png()).status_code == 200
    for content, status, words in (
        (b"", 400, "The file is empty"),
        (b"GIF89a nothing", 400, "no picture that can be read"),
        (png(kind="GIF"), 400, "JPEG, PNG, WEBP, BMP, TIFF are known"),
        (png(64)[:70], 400, "no picture that can be read"),
        (bomb(8000), 413, "8000 x 8000, more than 50 million pixels"),
        (bomb(60000), 413, "The picture has more than 50 million pixels"),
        (bytes(page.MAX_BYTES + 1), 413, "more than 20 MB"),
    ):
        answer = client.post("/pictures", content=content)
        assert (answer.status_code, words in answer.json()["error"]) == (status, True), (answer.json(), words)
        assert "object at" not in answer.json()["error"]
    monkeypatch.setattr(page, "MAX_BYTES", 2**10)
    assert client.post("/pictures", content=(bytes(2**9) for _ in range(9))).status_code == 413  # of no said length


def test_errors_are_sentences(client, viewer, monkeypatch):
    number = client.post("/pictures", content=png()).json()["number"]
    for path, status, words in (
        (f"/pictures/{number}/exits", 400, "DeiT has no early exits"),
        (f"/pictures/{number}/heat", 404, "There is no view 'heat'; there are attended"),
        (f"/pictures/{number}/rollout?y=2&x=0", 400, "each from 0 to 1"),
        (f"/pictures/{number}/rollout?y=0.5", 400, "each from 0 to 1"),
        (f"/pictures/{number}/rollout?y=nan&x=0", 400, "each from 0 to 1"),
        ("/pictures/999", 404, "no longer kept"),
    ):
        answer = client.get(path)
        assert (answer.status_code, words in answer.json()["error"]) == (status, True), answer.json()
    assert "cannot be read" in client.post("/files/1").json()["error"]
    assert "no such file" in client.post("/files/2").json()["error"]
    monkeypatch.setattr(viewer, "draw", lambda *_: 1 / 0)
    broken = client.get(f"/pictures/{number}/rollout")
    assert broken.status_code == 500 and "stopped with an error" in broken.json()["error"]


def test_other_names_than_the_loopback_s_are_refused(viewer, client):
    assert client.get("/about", headers={"host": "evil.example"}).status_code == 400
    everyone = TestClient(page.make_app(viewer, hosts=("*",)), base_url="http://machine.example")
    assert everyone.get("/about").status_code == 200


def test_what_other_pages_ask_for_is_refused(client):
    elsewhere = ({"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"}, {"origin": "null"})
    for headers in (*elsewhere, {"origin": "http://evil.example"}, {"origin": "http://127.0.0.1:3000"}):
        for answer in (client.post("/pictures", content=png(), headers=headers), client.get("/about", headers=headers)):
            assert (answer.status_code, "Another page" in answer.json()["error"]) == (403, True)
    for headers in ({"sec-fetch-site": "same-origin"}, {"origin": "http://127.0.0.1:1"}, {"sec-fetch-site": "none"}):
        assert client.post("/files/0", headers=headers).status_code == 200
    link = client.get("/", headers={"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"})
    assert link.status_code == 200 and "frame-ancestors 'none'" in link.headers["content-security-policy"]


def test_old_pictures_go(client):
    first = client.post("/pictures", content=png()).json()["number"]
    for _ in range(page.KEPT):
        client.post("/pictures", content=png())
    assert client.get(f"/pictures/{first}").status_code == 404


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.browser
@pytest.mark.skipif(not (CHROMIUM and shutil.which("chromedriver")), reason="needs chromium and chromedriver")
def test_a_browser_shows_what_a_clicked_place_attends_to(pictures, tmp_path):
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.wait import WebDriverWait

    command = [sys.executable, "-m", "visionzoo", "view", *map(str, sorted(pictures.iterdir())), *FLAGS, "--port", "0"]
    served = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,900"):
        options.add_argument(flag)
    browser = None
    try:
        line = next(line for line in served.stdout if line.startswith("look at "))
        service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
        browser = webdriver.Chrome(options=options, service=service)
        wait = WebDriverWait(browser, 60)
        browser.get(re.search(r"http://127\.0\.0\.1:\d+", line).group())

        def find(name):
            return browser.find_element(By.ID, name)

        def drawn(before=None):
            wait.until(lambda _: find("view").is_displayed() and find("view").get_attribute("src") != before)
            return find("view").get_attribute("src")

        first = drawn()
        assert len(browser.find_elements(By.CSS_SELECTOR, "#classes tr")) == 3
        webdriver.ActionChains(browser).move_to_element_with_offset(find("picture"), -120, -120).click().perform()
        assert drawn(first) != first and find("mark").is_displayed()
        browser.find_element(By.NAME, "rollout").click()
        wait.until(lambda _: find("words").text.startswith("of the place at "))
        browser.find_element(By.NAME, "exits").click()
        wait.until(lambda _: "has no early exits" in find("words").text)
        assert not find("view").is_displayed()
        (tmp_path / "no.png").write_text("no picture")
        find("upload").send_keys(str(tmp_path / "no.png"))
        wait.until(lambda _: "no picture that can be read" in find("message").text)
        assert [entry for entry in browser.get_log("browser") if "Content Security" in entry["message"]] == []
    finally:
        if browser is not None:
            browser.quit()
        served.terminate()
        served.wait(20)
