"""`backdrop serve`: what the command line and the settings file make of engines and gateway, nothing started."""

import pytest
import yaml
from paths import EXAMPLE
from typer.testing import CliRunner

import backdrop.commands.serve as command
from backdrop.cli import app
from backdrop.hub_export.extend import extend_model
from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration

MODEL = str(EXAMPLE)


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """Runs the command; (settings, the engines' settings)."""
    found = []
    monkeypatch.setattr(command, "_run", lambda settings, engines, *rest: found.append((settings, engines)))
    (tmp_path / "python").touch()

    def run(*words, config: dict | None = None):
        words = [*words, "--engine-python", str(tmp_path / "python"), "--log-folder", str(tmp_path)]
        if config is not None:
            (tmp_path / "gateway.yaml").write_text(yaml.safe_dump(config))
            words += ["--config", str(tmp_path / "gateway.yaml")]
        result = CliRunner().invoke(app, ["serve", *words])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        settings, engines = found.pop()
        return settings, [engine.settings for engine in engines]

    return run


def test_engines_and_gateway_know_of_each_other(serve):
    settings, engines = serve(MODEL, "--replicas", "2", "--engine-port", "9100")
    assert settings.replicas == ["http://127.0.0.1:9100", "http://127.0.0.1:9101"] and settings.split
    assert [engine.url for engine in engines] == settings.replicas
    # vLLM's own block on the CPU is longer than many a background.
    assert {engine.block_size for engine in engines} == {32}


def test_what_a_cache_is_sized_for_is_what_the_engine_is_told(serve):
    _, (engine,) = serve(MODEL, "--backgrounds", "10", "--max-model-len", "512")
    assert engine.max_num_seqs == 256 and engine.kv_cache_bytes and engine.max_num_batched_tokens == 16_384
    with pytest.raises(ValueError, match="--backgrounds needs --max-model-len"):
        serve(MODEL, "--backgrounds", "10")


def test_the_settings_file_counts(serve):
    config = {"split": False, "limits": {"images": 40}, "matching": {"tolerance": 3}}
    settings, (engine,) = serve(MODEL, config=config)
    assert not settings.split and engine.images == 80 and settings.matching.tolerance == 3
    settings, _ = serve(MODEL, "--split", "--tolerance", "0", config=config)
    assert settings.split and settings.matching.tolerance == 0
    settings, engines = serve(MODEL, config={"replicas": ["http://10.0.0.5:8000"]})
    assert settings.replicas == ["http://10.0.0.5:8000"] and engines == []
    settings, engines = serve(MODEL, "--replica", "http://a:1", config={"replicas": ["http://10.0.0.5:8000"]})
    assert settings.replicas == ["http://a:1"] and engines == []


def test_prefusion_is_refused_before_an_engine_starts(serve, tmp_path):
    model = BackdropForConditionalGeneration.from_pretrained(MODEL)
    extend_model(model, num_prefusion_layers=1)
    model.config.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="has 1 prefusion layers.*--fold-prefusion"):
        serve(str(tmp_path / "model"))
