"""Published weights that cannot be had are one short message after one request."""

import traceback

import pytest
import timm
from engine.helpers import run_tool
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

import visionzoo  # noqa: F401
from visionzoo.models import _network


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """What the hub is asked for, with the seconds that it has; the network swallows it all."""
    heard = []

    def metadata(url, timeout):
        heard.append((url.removeprefix("https://huggingface.co/"), timeout))
        raise TimeoutError("timed out")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 7)
    monkeypatch.setattr(_network, "get_hf_file_metadata", metadata)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", lambda *_, **__: pytest.fail("it asks for minutes"))
    return heard


def test_a_model_asks_once_and_has_a_short_traceback(asked, tmp_path):
    with pytest.raises(LocalEntryNotFoundError) as raised:
        timm.create_model("zoo_convit_t", pretrained=True)
    said = str(raised.value)
    assert said.startswith(f"the weights of zoo_convit_t are neither in the cache {tmp_path / 'cache'} nor to ")
    assert "timm/convit_tiny.fb_in1k (TimeoutError)" in said and "visionzoo.load_weights(model, path)" in said
    assert asked == [("timm/convit_tiny.fb_in1k/resolve/main/model.safetensors", 7)]
    assert len(traceback.format_exception(raised.value)) < 10


@pytest.mark.parametrize(
    ("model", "url"),
    [
        ("zoo_convit_t", "timm/convit_tiny.fb_in1k/resolve/main/model.safetensors"),
        ("resnet18.a1_in1k", "timm/resnet18.a1_in1k/resolve/main/model.safetensors"),
        ("hf-hub:someone/model@v1", "someone/model/resolve/v1/config.json"),
    ],
)
def test_a_command_asks_once(asked, capsys, model, url):
    argv = ["--model", model, "--pretrained", "--dataset", "visionzoo/digits", "--device", "cpu"]
    assert run_tool("eval", *argv) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: the weights of {model} are neither in the cache ") and said.count("\n") == 1
    assert "(TimeoutError)" in said and asked == [(url, 7)]


def test_what_the_hub_answers_is_left_to_timm(asked, monkeypatch):
    def refuse(url, timeout):
        raise HfHubHTTPError.__new__(HfHubHTTPError)

    monkeypatch.setattr(_network, "get_hf_file_metadata", refuse)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", lambda *_, **__: asked.append("timm"))
    with pytest.raises(TypeError):  # no file was downloaded
        timm.create_model("zoo_convit_t", pretrained=True)
    assert asked == ["timm"]
