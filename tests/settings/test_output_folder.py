"""A settings file must not leave the place of a run's results to a default of transformers."""

import pytest

pytest.importorskip("transformers")
pytest.importorskip("yaml")
pytest.importorskip("rich")

from windkern.settings.run import METHODS, classes_of, load_settings

KEYS = {"wind": "model: a\ntrain_dataset: demo\n", "value": ""}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("given", "came"), [("", "null"), ("null", "null"), ("''", "''"), ("$EMPTY", "''")])
def test_an_output_folder_without_a_name_is_refused(tmp_path, monkeypatch, method, given, came):
    """A run would write into trainer_output, the default of transformers, or into the current directory."""
    monkeypatch.setenv("EMPTY", "")
    path = tmp_path / "x.yaml"
    path.write_text(f"method: {method}\n{KEYS[method]}use_cpu: true\nreport_to: none\noutput_dir: {given}\n")
    with pytest.raises(ValueError, match=rf"x\.yaml: output_dir must be the path of a folder, .* got {came}$"):
        load_settings(str(path))
    with pytest.raises(ValueError, match=r"--override output_dir=: output_dir must be the path of a folder, .*null$"):
        load_settings(str(path), ["output_dir="])
    assert load_settings(str(path), output_dir="out")[1].output_dir == "out"


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_output_folder_is_refused_in_python(method):
    with pytest.raises(ValueError, match="output_dir must be the path of a folder, such as runs/mine, got ' '"):
        classes_of(method)[1](output_dir=" ", use_cpu=True, report_to="none")
