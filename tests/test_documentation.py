"""What README and docs say is so: commands parse, keys exist, links resolve, messages are the code's, examples run."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import os
import re
import shlex
from pathlib import Path

import pytest

import raft_jax
from raft_jax import config_reference
from raft_jax.cli import make_parser
from raft_jax.config import Config, EndpointConfig
from raft_jax.config_file import load_config
from raft_jax.evaluate.compare import load_general_prompts
from raft_jax.models import Model
from raft_jax.settings_text import flat

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text("utf-8")
    for path in (
        *sorted(ROOT.glob("*.md")),
        *sorted((ROOT / "docs").glob("*.md")),
        *sorted((ROOT / "benchmarks").rglob("*.md")),
    )
}
PLACEHOLDERS = ("CONFIG", "VERB", "my-run.yaml", "config.yaml")


def code_blocks(text: str) -> list[str]:
    """Fenced and indented blocks."""
    fenced = re.findall(r"^ *```\w*\n(.*?)^ *```", text, flags=re.DOTALL | re.MULTILINE)
    rest = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    return fenced + re.findall(r"(?:^ {4}.*\n?)+", rest, flags=re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    """The words of every `raft-jax …` in a page: lines of code blocks, and inline code."""
    lines = [line.strip() for block in code_blocks(text) for line in block.splitlines()]
    lines += re.findall(r"`(raft-jax [^`]+)`", text)
    found = [shlex.split(line, comments=True) for line in lines if line.startswith("raft-jax ")]
    return [words for words in found if "error:" not in words[1:2]]


COMMANDS = [(page, words) for page, text in PAGES.items() for words in commands(text)]


def test_there_are_commands():
    assert len(COMMANDS) > 10 and {words[1] for _, words in COMMANDS} >= {"check", "run", "generate", "report"}


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[" ".join(words)[:60] for _, words in COMMANDS])
def test_a_command_parses_and_its_settings_are_valid(page, words, capsys):
    verbs = next(action for action in make_parser()._actions if isinstance(action, argparse._SubParsersAction)).choices
    assert words[1] in (*verbs, "CONFIG", "--help"), words
    if len(words) == 2:  # the verb alone, as a name
        return
    args, rest = make_parser().parse_known_args(words[1:])
    assert not [word for word in rest if word.startswith("-")]
    given = [*args.words, *rest]
    path = args.config if hasattr(args, "config") else None if getattr(args, "model", "prompts") else given.pop(0)
    overrides = [word for word in given if re.match(r"[\w.]+=", word)]
    if path is None:
        return
    if path in PLACEHOLDERS:
        path = "configs/own-data.yaml"
    load_config(ROOT / path, overrides)


@pytest.mark.parametrize("page", PAGES)
def test_settings_that_a_page_names_exist(page):
    """`group.key` and `group.key=value` in inline code, unless it is a file or an attribute of a Model."""
    known = set(flat(config_reference_defaults()))
    groups = {key.partition(".")[0] for key in known if "." in key}
    attributes = {f"model.{name}" for name in (*dir(Model), *(field.name for field in dataclasses.fields(Model)))}
    for code in re.findall(r"`([^`\n]+)`", PAGES[page]):
        for word in code.split():
            match = re.fullmatch(r"((?:\w+\.)+\w+)(=.*)?", word)
            if not match or match[1].partition(".")[0] not in groups:
                continue
            if match[1].endswith((".py", ".md", ".jsonl", ".sha256", ".safetensors")) or match[1] in attributes:
                continue
            assert match[1] in known or any(key.startswith(match[1] + ".") for key in known), f"{page}: {match[1]}"


def config_reference_defaults() -> dict:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.structured(Config))


def anchors(text: str) -> set[str]:
    """GitHub's names of a page's headings."""
    headings = re.findall(
        r"^#+ +(.+)$", re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE), flags=re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page):
    text = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(path.read_text("utf-8")), f"{page}: {target}"


def test_every_page_is_linked_from_the_readme_or_from_the_index():
    linked = {"README.md"}
    for page in ("README.md", "docs/README.md"):
        for target in re.findall(r"\]\(([^)#\s]+)", PAGES[page]):
            linked.add(os.path.normpath(Path(page).parent / target))
    assert PAGES.keys() - linked <= {"benchmarks/results/README.md"}  # benchmarks/README.md links it


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/configuration.md"])  # that one is generated
def test_files_that_a_page_names_exist(page):
    folders = "raft_jax|tests|docs|benchmarks|configs|examples|tpu_scripts"
    for code in re.findall(r"`([^`\n]+)`", PAGES[page]):
        for path in re.findall(rf"(?<![\w/.-])((?:{folders})/[\w/.-]*\w)", code):
            assert (ROOT / path).exists() or "gpu/packed" in path, f"{page}: {path}"  # packed: ignored by git


def test_names_that_the_architecture_page_puts_in_a_file_are_there():
    named = re.findall(r"`([\w.]+)` in `(raft_jax/[\w/]+\.py)`", PAGES["ARCHITECTURE.md"])
    assert len(named) > 8
    for name, path in named:
        text = (ROOT / path).read_text("utf-8")
        assert all(re.search(rf"\b{part}\b", text) for part in name.split(".")), f"{name} in {path}"


def test_the_architecture_page_lists_every_module_and_package():
    listing = PAGES["ARCHITECTURE.md"].partition("## The files")[2]
    listed = re.findall(r"^ {6}([\w.]+/?) ", listing, flags=re.MULTILINE)
    package = Path(raft_jax.__file__).parent
    modules = {path.name for path in package.glob("*.py")} - {"__init__.py", "__main__.py"}
    packages = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert sorted(listed) == sorted(modules | packages)


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_that_a_page_names_exist(page):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), flags=re.MULTILINE)
    code = "\n".join([*code_blocks(PAGES[page]), *re.findall(r"`([^`\n]+)`", PAGES[page])])
    for target in re.findall(r"^ *make ([\w-]+)", code, flags=re.MULTILINE):
        assert target in targets, f"{page}: make {target}"


def test_a_page_begins_with_who_it_is_for():
    for page, text in PAGES.items():
        first = text.split("\n\n")[1]
        generated = page == "docs/configuration.md"
        assert (
            generated
            or re.search(r"\bFor people who\b|\bby reader\b", first)
            or page
            in (
                "README.md",
                "benchmarks/gpu/README.md",
            )
        ), page


def test_the_configuration_page_is_up_to_date():
    assert PAGES["docs/configuration.md"] == config_reference.reference(), (
        "run: python -m raft_jax.config_reference > docs/configuration.md"
    )


def test_the_configuration_page_has_every_key_with_a_comment():
    allowed = config_reference.allowed_values()
    keys = [
        key
        for prefix, group in config_reference.groups(Config)
        for key in config_reference.keys_of(prefix, group, allowed)
    ]
    endpoint = [f"endpoints.NAME.{field.name}" for field in dataclasses.fields(EndpointConfig)]
    assert sorted(key.name for key in keys) == sorted([*flat(config_reference_defaults()), *endpoint])
    assert not [key.name for key in keys if not key.comment]
    batch_size = next(key for key in keys if key.name == "train.batch_size")
    assert (batch_size.type, batch_size.default, batch_size.allowed) == ("int", "`16`", "1 or more")
    assert next(key for key in keys if key.name == "run_dir").default == ""
    assert next(key for key in keys if key.name == "train.max_steps").default == "`null`"


def strings_of_the_code() -> list[str]:
    """Every text in our code and OmegaConf's answer to an unknown key, with … for what is filled in."""
    found = ["Key '…' not in '…'. Did you mean: '…'?", "raft-jax: command not found", "No space left on device"]

    def text_of(node: ast.AST) -> str | None:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        if isinstance(node, ast.JoinedStr):
            return "".join(text_of(part) or "…" for part in node.values)
        return None

    for path in sorted(Path(raft_jax.__file__).parent.rglob("*.py")):
        found += [text for node in ast.walk(ast.parse(path.read_text("utf-8"))) if (text := text_of(node))]
    return found


@pytest.mark.parametrize("page", ["docs/troubleshooting.md", "docs/general_prompts.md"])
def test_messages_are_those_of_the_code(page):
    tables = re.findall(r"^\| message \|.*\n\|[-|]+\n((?:\|.*\n)+)", PAGES[page], flags=re.MULTILINE)
    messages = [re.match(r"\| `([^`]+)`", row)[1] for table in tables for row in table.splitlines()]
    assert len(messages) >= 4
    texts = strings_of_the_code()
    for message in messages:
        parts = [part.strip() for part in message.split("…") if len(part.strip()) > 2]
        pattern = ".*".join(map(re.escape, parts))
        candidates = [re.sub(r"\s+", " ", text) for text in texts]
        candidates.append("No space left on device; free some, and the same command goes on from here")
        assert any(re.search(pattern, text) for text in candidates), f"{page}: {message}"


def test_the_full_disk_s_line_is_that_of_the_command_line():
    assert "; free some, and the same command goes on from here" in "".join(strings_of_the_code())


def test_the_example_of_general_prompts_is_read(tmp_path):
    block = next(block for block in code_blocks(PAGES["docs/general_prompts.md"]) if block.startswith('{"id"'))
    (tmp_path / "general.jsonl").write_text(block, "utf-8")
    prompts = load_general_prompts(str(tmp_path / "general.jsonl"))
    assert [prompt.check and prompt.check["kind"] for prompt in prompts] == [
        "number",
        "contains_any",
        "regex",
        "exact",
        None,
    ]
    assert all(json.loads(line).keys() == {"id", "category", "prompt", "check"} for line in block.splitlines())


def test_the_example_of_checks_runs():
    exec(next(block for block in code_blocks(PAGES["docs/general_prompts.md"]) if "is_correct" in block), {})


def test_the_example_of_refined_rows_runs(tmp_path, monkeypatch, capsys):
    from made_up_run import make_run, read_lines

    folder = make_run(tmp_path / "runs" / "quickstart")
    monkeypatch.chdir(tmp_path)
    exec(next(block for block in code_blocks(PAGES["docs/refinement.md"]) if "json.loads" in block), {})
    fused = sum(row["chosen"] == "fusion" for row in read_lines(folder / "refined" / "refined.jsonl"))
    assert capsys.readouterr().out.count("->") == fused > 0


def test_the_config_for_own_data_passes_check_with_forty_rows_as_they_are(
    tmp_path, capsys, monkeypatch, write_folder, llama_config, random_tensors
):
    """The README's command, with another model: its limits leave out nothing of some ordinary rows."""
    from tiny import ENCODER, ROWS, write_jsonl

    from raft_jax.cli import main

    hf = llama_config | {"max_position_embeddings": 4096}
    write_folder(tmp_path / "model", hf, random_tensors(hf))
    rows = [
        {"question": f"{row['question']} ({number})", "answer": row["answer"] * 3}
        for number in range(4)
        for row in ROWS
    ]
    write_jsonl(tmp_path / "my.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    config = ROOT / "configs/own-data.yaml"
    assert main(["check", str(config), "data.path=my.jsonl", "model.source=model", f"encoder.source={ENCODER}"]) == 0
    printed = capsys.readouterr().out
    assert "training: 32 of 32 rows are used" in printed and "held-out: 32 of 32 rows are used" in printed
    assert not (tmp_path / "runs").exists()
    neutral = load_config(config)
    assert neutral.refine.max_new_tokens == neutral.data.max_answer_tokens == neutral.evaluate.max_new_tokens
