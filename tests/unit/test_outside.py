"""Methods of other packages: found by entry point, imported when asked for, and their errors say whose they are."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from treelora_ray.config import ConfigError, from_mapping, load
from treelora_ray.methods import outside
from treelora_ray.methods.base import find
from treelora_ray.methods.catalogue import METHODS
from treelora_ray.methods.options import BUILT_IN, METHOD_OPTIONS
from treelora_ray.reference import reference

METHOD = """
from treelora_ray.config import Options
from treelora_ray.methods.base import Method, register


class ThingOptions(Options):
    \"\"\"A method from elsewhere.\"\"\"

    amount: int = 3
    \"\"\"Of something.\"\"\"


@register({name!r}, ThingOptions)
class Thing(Method):
    keeps = "a thing"
"""


def install(folder: Path, dist: str, entries: dict[str, str], **modules: str) -> None:
    """A distribution as an installer leaves it."""
    info = folder / f"{dist.replace('-', '_')}-0.3.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 0.3\n")
    lines = [f"{name} = {value}" for name, value in entries.items()]
    (info / "entry_points.txt").write_text(f"[{outside.GROUP}]\n" + "\n".join(lines) + "\n")
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that packages may be installed into."""
    before, methods, modules = dict(METHOD_OPTIONS), dict(METHODS), set(sys.modules)
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for table, old in ((METHOD_OPTIONS, before), (METHODS, methods)):
        table.clear()
        table.update(old)  # type: ignore[arg-type]
    for name in set(sys.modules) - modules:
        if name.startswith("outside_"):
            del sys.modules[name]


def message(name: str) -> str:
    with pytest.raises(ConfigError) as failed:
        from_mapping({"method": {"name": name}, "seed": -1})
    assert "seed" in str(failed.value)  # what else is wrong is said with it
    return str(failed.value)


def test_a_method_of_another_package_is_imported_when_a_config_names_it(site: Path) -> None:
    install(site, "thing-method", {"thing": "outside_thing"}, outside_thing=METHOD.format(name="thing"))
    assert load("quickstart").method.name == "treelora"
    assert "outside_thing" not in sys.modules
    assert from_mapping({"method": {"name": "thing"}}).method.model_dump() == {"name": "thing", "amount": 3}
    assert find("thing").keeps == "a thing"
    assert outside.distribution("thing") == ("thing-method", "0.3")
    with pytest.raises(ConfigError, match=r"method.amout is unknown; did you mean method.amount"):
        from_mapping({"method": {"name": "thing", "amout": 3}})


def test_a_method_is_found_where_only_its_options_have_been_imported(site: Path) -> None:
    """As on a worker that was sent a config."""
    install(site, "thing-method", {"thing": "outside_thing"}, outside_thing=METHOD.format(name="thing"))
    assert "thing" not in METHODS
    assert find("thing").name == "thing"


def test_a_package_that_cannot_be_imported_is_named_and_breaks_nothing_else(site: Path) -> None:
    broken = METHOD.format(name="broken") + "\nimport there_is_no_such_module\n"
    install(site, "broken-method", {"broken": "outside_broken"}, outside_broken=broken)
    install(site, "thing-method", {"thing": "outside_thing"}, outside_thing=METHOD.format(name="thing"))
    says = (
        "entry point `broken = outside_broken` of distribution broken-method 0.3 cannot be loaded: "
        "ModuleNotFoundError: No module named 'there_is_no_such_module'; repair or uninstall it"
    )
    for _ in range(2):  # what it had registered before it broke does not make it whole
        assert says in message("broken")
    assert from_mapping({"method": {"name": "thing"}}).method.name == "thing"
    assert from_mapping({"method": {"name": "ewc"}}).method.name == "ewc"
    assert outside.load_all() == [says]


def test_an_entry_that_registers_another_name_says_so(site: Path) -> None:
    install(site, "thing-method", {"other": "outside_thing"}, outside_thing=METHOD.format(name="thing"))
    assert "of distribution thing-method 0.3 registers no method 'other'" in message("other")


def test_names_of_our_own_methods_are_not_taken(site: Path) -> None:
    own = METHOD_OPTIONS["ewc"]
    sly = METHOD.format(name="ewc")
    install(site, "sly-method", {"ewc": "outside_sly", "sly": "outside_sly"}, outside_sly=sly)
    assert from_mapping({"method": {"name": "ewc"}}).method.__class__ is own
    assert "method 'ewc' is registered already, by Ewc" in message("sly")
    shadowed, broken = outside.load_all()
    assert shadowed.startswith("entry point `ewc = outside_sly` of distribution sly-method 0.3 is never used")
    assert "is registered already" in broken
    assert METHOD_OPTIONS["ewc"] is own


def test_two_packages_with_one_name_are_told_apart(site: Path) -> None:
    for dist in ("one-method", "other-method"):
        install(site, dist, {"thing": "outside_thing"}, outside_thing=METHOD.format(name="thing"))
    assert "uninstall all but one" in message("thing")
    assert "one-method 0.3" in message("thing")
    assert "other-method 0.3" in message("thing")


def test_an_unknown_name_is_compared_with_those_of_other_packages_too(site: Path) -> None:
    install(site, "thing-method", {"thing": "outside_thing"}, outside_thing=METHOD.format(name="thing"))
    assert "method.name 'thingg' is unknown; did you mean 'thing'?" in message("thingg")
    assert "outside_thing" not in sys.modules


@pytest.mark.parametrize("name", [["ewc"], 3, None])
def test_a_name_that_is_no_text_is_refused_in_words(name: object) -> None:
    with pytest.raises(ConfigError, match=r"method.name .* is unknown"):
        from_mapping({"method": {"name": name}})


def test_the_page_of_settings_is_of_our_own_methods_and_lists_all_where_asked(site: Path) -> None:
    install(site, "thing-method", {"thing": "outside_thing"}, outside_thing=METHOD.format(name="thing"))
    page = reference()
    assert outside.load_all() == []
    assert reference() == page
    assert reference(METHOD_OPTIONS).count("| `method.amount` | `3` | Of something. |") == 1
    assert set(METHOD_OPTIONS) - set(BUILT_IN) == {"thing"}
