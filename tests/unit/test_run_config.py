import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from treelora_ray.config import (
    ConfigError,
    RunConfig,
    differences,
    from_mapping,
    keys,
    load,
    overridden,
    presets,
    run_name,
    with_values,
)


def wrong(source: str | Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(source, overrides)
    return str(caught.value)


def test_every_preset_loads_and_its_effective_config_is_the_same_config(tmp_path: Path) -> None:
    for name in presets():
        config = load(name)
        (tmp_path / "again.yaml").write_text(config.to_yaml())
        assert load(tmp_path / "again.yaml") == config
        assert load(tmp_path / "again.yaml").digest == config.digest


@given(
    seed=st.integers(0, 2**31 - 1),
    lr=st.floats(1e-9, 10),
    pull=st.floats(0, 100),
    tasks=st.none() | st.integers(1, 48) | st.lists(st.from_regex(r"[a-z0-9._-]{1,9}", fullmatch=True), max_size=3),
)
@example(seed=0, lr=0.1, pull=0.0, tasks=["0e0", "1e5", "1.5e-3"])
def test_what_is_written_is_read_back(
    seed: int, lr: float, pull: float, tasks: object, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = from_mapping({"seed": seed, "train": {"lr": lr}, "method": {"lambda": pull}, "stream": {"tasks": tasks}})
    path = tmp_path_factory.mktemp("config") / "a.yaml"
    path.write_text(config.to_yaml())
    assert load(path) == config


def test_overrides_reach_any_depth_and_are_read_as_yaml() -> None:
    config = load(
        "quickstart",
        ["train.lr=2e-3", "method.lambda=0.3", "method.guide.search=random", "train.clip=null", "stream.tasks=[a, b]"],
    )
    assert (config.train.lr, config.train.clip, config.stream.tasks) == (0.002, None, ["a", "b"])
    options = config.method.model_dump(by_alias=True)
    assert (options["lambda"], options["guide"]["search"]) == (0.3, "random")


def test_values_at_dotted_keys_are_set_in_their_order_and_checked() -> None:
    base, method = load("quickstart"), {"name": "replay"}
    config = with_values(base, {"method": method, "method.memory": 3, "train.lr": 0.1}, "the caller")
    assert (config.method.model_dump()["memory"], config.train.lr, config.stream) == (3, 0.1, base.stream)
    assert method == {"name": "replay"}
    assert base == load("quickstart")
    with pytest.raises(
        ConfigError, match=r"the caller cannot be used:\n  method\.lamda is unknown; did you mean method\.l"
    ):
        with_values(base, {"method.lamda": 1}, "the caller")
    assert overridden(["train.lr=2e-3", "stream.tasks=[a, b]"]) == {"train.lr": 0.002, "stream.tasks": ["a", "b"]}


def test_all_mistakes_stand_in_one_report() -> None:
    said = wrong("quickstart", "lr=3", "method.lamda=3", "train.batch=-3", "seed=x", "train.lr.z=3", "foo")
    assert "lr is unknown; did you mean train.lr?" in said
    assert "method.lamda is unknown; did you mean method.lambda?" in said
    assert "train.batch is -3: input should be greater than or equal to 1" in said
    assert "seed is 'x'" in said
    assert "train.lr.z cannot be set: train.lr is 0.005, which has nothing below it" in said
    assert "'foo' is no override: write key.path=value" in said


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["stream.source=parquet"], "stream.path is missing"),
        (["stream.source=split", "stream.path=x"], "stream.classes_per_task is missing"),
        (["train.micro_batch=64"], "train.micro_batch is 64, more than train.batch, which is 32"),
        (["stream.watch=8"], "evaluate.every after how many steps: give both, or leave both out"),
        (["model.quantize=4bit"], "model.quantize is 4bit, which is not supported"),
        (["model.shard=fsdp"], "model.shard is fsdp, which is not supported"),
        (["objective.packing=true"], "objective.packing is true, which is not supported"),
        (["method.name=treelor"], "method.name 'treelor' is unknown; did you mean 'treelora'?"),
        (["method=treelora"], "write its options below it"),
        (["method.guide.serch=random"], "setting 'serch' is unknown; did you mean 'search'?"),
        (["method.guide.seed=1"], "seed of the guide is set by the run"),
        (["method.guide.observe=step"], "observe is 'step', which modes paper and released have"),
        (["method.mode=paper", "method.start=similar"], "start is 'similar', but with observe 'step' nothing is known"),
        (["method.mode=paper", "method.penalty=prox"], "penalty is 'prox', which mode paper does not have"),
        (["name=a/b"], "name is 'a/b'"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_what_to_do(overrides: list[str], says: str) -> None:
    assert says in wrong("quickstart", *overrides)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seed: 1\nseed: 2\n", "key 'seed' stands twice"),
        ("- 1\n", "must hold keys and values"),
        ("a: [1\n", "is not valid YAML"),
    ],
)
def test_a_file_that_is_no_config_is_refused(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    assert says in wrong(tmp_path / "a.yaml")


def test_an_unknown_file_names_the_presets() -> None:
    assert "did you mean 'quickstart'?" in wrong("quikstart")


def test_the_digest_is_that_of_what_results_depend_on() -> None:
    plain = RunConfig()
    for free in ({"name": "x"}, {"folder": "y"}, {"evaluate": {"batch": 3}}, {"train": {"threads": 1}}):
        assert from_mapping(free).digest == plain.digest
        assert differences(plain, from_mapping(free)) == []
    for bound in ({"seed": 1}, {"train": {"micro_batch": 2}}, {"method": {"lambda": 0.2}}):
        assert from_mapping(bound).digest != plain.digest
        assert len(differences(plain, from_mapping(bound))) == 1


def test_a_run_is_named_after_what_it_is() -> None:
    assert run_name(from_mapping({"seed": 3, "method": {"name": "joint"}})) == "joint-digits-seed3"
    assert run_name(from_mapping({"name": "mine"})) == "mine"
    assert run_name(from_mapping({"method": {"name": "der++"}})) == "derpp-digits-seed0"


def test_every_key_says_what_it_is() -> None:
    from treelora_ray.methods.options import METHOD_OPTIONS

    for options in METHOD_OPTIONS.values():
        assert all(field.description for field in options.model_fields.values()), options
        assert options.__doc__
    assert "train.lr" in keys()


def test_reading_a_config_brings_no_heavy_library() -> None:
    code = (
        "import sys, treelora_ray, treelora_ray.config as c; c.load('seqlora'); c.RunConfig(); "
        "print(sorted({'torch', 'transformers', 'peft', 'pyarrow', 'ray', 'mlflow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
