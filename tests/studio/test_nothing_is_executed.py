"""Settings and names from others are data: nothing of them is run, and none is taken for markup."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dittocache
from dittocache.config import load_config
from dittocache.errors import ConfigError
from dittocache.studio.shown import shown

PACKAGE = Path(dittocache.__file__).parent
FROM_USERS = sorted(
    path for room in ("studio", "jobs", "config_aliases", "cli") for path in (PACKAGE / room).rglob("*.py")
)
STUDIO = sorted((PACKAGE / "studio").rglob("*.py"))

RUNS_TEXT = {"eval", "exec", "compile", "os.system", "os.popen", "pickle.load", "pickle.loads", "subprocess.getoutput"}
UNSAFE_YAML = {"yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.UnsafeLoader", "yaml.FullLoader"}
RAW_MARKUP = {"ui.html", "ui.markdown", "ui.add_body_html", "ui.interactive_image", "ui.chat_message"}


def _calls(paths: list[Path]) -> Iterator[tuple[Path, ast.Call]]:
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield path, node


@pytest.mark.parametrize(
    "settings",
    [
        "!!python/object/apply:os.system ['touch {file}']",
        "name: !!python/object/new:subprocess.Popen [[touch, {file}]]",
        "name: !!python/name:os.system",
        "name: !<tag:yaml.org,2002:python/object/apply:os.system> ['touch {file}']",
        "name: $(touch {file})",
        "name: '; touch {file} #'",
    ],
)
def test_settings_that_name_code_are_refused_unread(settings: str, tmp_path: Path) -> None:
    victim = tmp_path / "executed"
    config = tmp_path / "config.yaml"
    config.write_text(settings.format(file=victim), encoding="utf-8")
    with pytest.raises(ConfigError):
        load_config(config)
    assert not victim.exists()


def test_no_call_takes_text_for_code_or_a_shell() -> None:
    found = []
    for path, call in _calls(FROM_USERS):
        name = ast.unparse(call.func)
        shell = any(keyword.arg == "shell" for keyword in call.keywords)
        unsafe = {ast.unparse(node) for node in ast.walk(call) if isinstance(node, ast.Attribute)} & UNSAFE_YAML
        if name in RUNS_TEXT or shell or unsafe or (name == "yaml.load" and path.name != "config.py"):
            found.append(f"{path}:{call.lineno} {name}")
    assert not found


def test_pages_build_no_markup_from_values() -> None:
    """Labels and tables show text as it is; raw HTML would show a file name's markup."""
    found = []
    for path, call in _calls(STUDIO):
        words = [*call.args, *(keyword.value for keyword in call.keywords)]
        name = ast.unparse(call.func)
        spoken = " ".join(ast.unparse(word) for word in words)
        constant = all(isinstance(word, ast.Constant) for word in words)
        if (name in RAW_MARKUP and not constant) or "v-html" in spoken or "innerHTML" in spoken:
            found.append(f"{path}:{call.lineno} {name}")
        if any(keyword.arg == "html" and ast.unparse(keyword.value) != "False" for keyword in call.keywords):
            found.append(f"{path}:{call.lineno} {name} html=")
    assert not found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cat.png", "cat.png"),
        ("Füchse 🦊 狐.png", "Füchse 🦊 狐.png"),
        ("<b>bold</b>", "<b>bold</b>"),
        ("line\nbreak", "line\\nbreak"),
        ("gnp.\u202eexe", "gnp.\\u202eexe"),
        ("byte\udcff", "byte\\udcff"),
        ("\x1b[31mred", "\\x1b[31mred"),
    ],
)
def test_a_name_shows_what_it_holds(name: str, expected: str) -> None:
    assert shown(name) == expected


@given(st.text(st.characters(codec=None, categories=None), max_size=400))
def test_any_name_can_be_sent_to_a_page(name: str) -> None:
    text = shown(name)
    assert len(text) <= 200
    json.dumps(text, ensure_ascii=False).encode("utf-8")
    assert text.isprintable() or set(text) & set("\u200c\u200d\u00a0\u3000") or any(c.isspace() for c in text)
