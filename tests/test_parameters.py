import pytest

from atp_utils import parameters, resolve
from atp_utils.parameters import check, from_text, read_profile

BOOKS = sorted(path.stem for path in resolve("notebooks").glob("*.ipynb"))
PROFILES = sorted(path.stem for path in resolve("profiles").glob("*.yaml"))


@pytest.mark.parametrize("book", BOOKS)
def test_every_parameter_of_every_notebook_has_a_type(book):
    names = parameters.defaults_of(book)
    assert names and set(names) <= set(parameters.TYPES)


def test_no_type_is_without_a_parameter():
    assert set(parameters.TYPES) == {name for book in BOOKS for name in parameters.defaults_of(book)}


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_are_valid(name):
    assert read_profile(name).scenarios


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no parameter 'round' \(it has: .*rounds"):
        check("04_evolve_role_play", {"round": 3})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rounds", 0), ("rounds", 2.5), ("rounds", "6"), ("rounds", True), ("seeds", []), ("seeds", [0, -1]),
        ("arm", "ppo"), ("protocol", "ask"), ("temperature", -0.1), ("top_p", 0), ("thinking", "perhaps"),
        ("model", ""), ("items", None),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"04_evolve_role_play, parameter {name}: "):
        check("04_evolve_role_play", {name: value})


def test_numbers_as_yaml_and_the_command_line_write_them():
    assert check("02_align_dpo", {"learning_rate": "1e-5"}) == {"learning_rate": 1e-5}
    assert [from_text(text) for text in ("3", "[0, 1]", "true", "role_play", "0.5", "")] == [
        3, [0, 1], True, "role_play", 0.5, ""
    ]  # fmt: skip


PROFILE = """
models: {smollm2-135m: {}}
arms: [base]
scenarios: [role_play]
notebooks:
  01_generate_data: {seed: 1}
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seed: 1", "sed: 1", "01_generate_data: .*no parameter 'sed'"),
        ("seed: 1", "seed: -1", "parameter seed"),
        ("01_generate_data", "11_generate", "no notebook '11_generate'"),
        ("[base]", "[base, sft]", r"arms\.1"),
        ("arms: [base]", "arm: base", "arms: Field required.*arm: Extra"),
        ("[base]", "[base", "not valid YAML"),
        ("smollm2-135m: {}", "smollm2-135m: {01_generate_data: {seed: x}}", "parameter seed"),
    ],
)
def test_a_bad_profile_is_refused_by_file_and_key(tmp_path, old, new, message):
    path = tmp_path / "mine.yaml"
    path.write_text(PROFILE)
    assert read_profile(str(path)).parameters("01_generate_data") == {"seed": 1}
    path.write_text(PROFILE.replace(old, new))
    with pytest.raises((ValueError, FileNotFoundError), match=rf"(?s)(mine\.yaml.*)?{message}"):
        read_profile(str(path))


def test_an_unknown_profile_names_the_known_ones():
    with pytest.raises(FileNotFoundError, match=r"no profile 'huge' \(there are: .*quick"):
        read_profile("huge")


def test_model_settings_win_over_scenario_over_notebook(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        PROFILE.replace("{smollm2-135m: {}}", "{m: {02_align_dpo/role_play: {beta: 3}}}")
        + "  02_align_dpo: {beta: 1, seed: 5, lora_rank: 4}\n  02_align_dpo/role_play: {beta: 2, seed: 6}\n"
    )
    profile = read_profile(str(path))
    assert profile.parameters("02_align_dpo", "role_play", "m") == {"beta": 3, "seed": 6, "lora_rank": 4}
    assert profile.parameters("02_align_dpo", "role_play", "n")["beta"] == 2
