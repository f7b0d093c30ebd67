#!/usr/bin/env python3
"""Checks the prose of the repository: pages, comments and messages. `make lint` runs it; CONTRIBUTING.md has the rules.

    tests/prose/prose.py [FILE...]     check these files, or the whole repository
    tests/prose/prose.py --self-test   show that every rule rejects a text that breaks it, and accepts its replacement

Code spans, code blocks, quotations and addresses are not prose. A Rust file has prose in its comments, and in the string literals of
what is shipped; other programs have it in their comments.
"""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
WORDS = pathlib.Path(__file__).with_name("words.tsv")

MAX_WIDTH = 140
MAX_WORDS = 40

# What is generated from the code, or is not ours: the sources are checked, or belong to others.
SKIPPED = ("proto/", "crates/sds-server/proto/", "target/", "fuzz/corpus/", "tests/controlplane/crds/", "tests/interfaces.txt", "LICENSE",
           "docs/decisions/moves.md", "docs/decisions/texts.md", "tests/prose/")
COMMENT = {".py": "#", ".sh": "#", ".yaml": "#", ".yml": "#", ".toml": "#", ".tpl": "#", ".go": "//"}
NAMED = {"Makefile": "#", "Dockerfile": "#", "run": "#", ".editorconfig": "#", ".dockerignore": "#", ".gitignore": "#"}

# A question may begin with them.
QUESTION_WORDS = re.compile(r"^(?:And |But |Or )?(?:Who|What|Whoever|Whatever|Whom|Whose)\b")
SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[A-Z\"'(`\[§])")
MARKER = re.compile(r"^(?:[-*+]|\d+\.)\s+")


class Text:
    """A paragraph, and the line of the file on which it begins."""

    def __init__(self, line, text):
        self.line, self.text = line, text


def words():
    """The word list: a pattern, and what to write instead."""
    rows = [line.split("\t") for line in WORDS.read_text().splitlines() if line and not line.startswith("#")]
    return [(re.compile(rf"(?<![\w§-]){pattern}(?![\w§-])", re.IGNORECASE), pattern, instead) for pattern, instead in rows]


def without_code(text):
    """Code spans, quotations, addresses and link targets, replaced by one word each."""
    text = re.sub(r"``.*?``|`[^`]*`", "§", text)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    text = re.sub(r"https?://\S+", "§", text)
    text = re.sub(r"\"[^\"]*\"|“[^”]*”", "§", text)
    return text


def markdown(lines):
    """Paragraphs of a page: list items and table cells are paragraphs of their own."""
    paragraph, start, fence = [], 0, None
    for number, line in enumerate(lines, 1):
        stripped = line.strip()
        opening = re.match(r"(`{3,}|~{3,})", stripped)
        if fence or opening:
            if not fence:
                fence = opening[1]
            elif stripped.startswith(fence):
                fence = None
            stripped = ""
        elif re.fullmatch(r"\|?[-|: ]+\|?", stripped) or line.startswith("    ") and not paragraph:
            stripped = ""
        elif stripped.startswith("|"):
            yield from (Text(number, cell.strip()) for cell in re.split(r"(?<!\\)\|", stripped) if cell.strip())
            stripped = ""
        new = MARKER.match(stripped) or stripped.startswith(("#", ">", "<"))
        if (not stripped or new) and paragraph:
            yield Text(start, " ".join(paragraph))
            paragraph = []
        if stripped:
            if not paragraph:
                start = number
            paragraph.append(MARKER.sub("", stripped.lstrip("#> ")))
            if stripped.startswith("#"):
                yield Text(start, " ".join(paragraph))
                paragraph = []
    if paragraph:
        yield Text(start, " ".join(paragraph))


def comments(lines, mark):
    """Blocks of whole-line comments, read as pages; and comments behind code."""
    block, start = [], 0
    for number, line in enumerate([*lines, ""], 1):
        match = re.match(rf"\s*{re.escape(mark)}[/!]?(.*)", line) if mark == "//" else re.match(rf"\s*{mark}+(?!!)(.*)", line)
        if match:
            if not block:
                start = number
            block.append(re.sub(r"^ ", "", match[1]))
            continue
        yield from (Text(start + text.line - 1, text.text) for text in markdown(block))
        block = []
        behind = re.search(rf"\s{re.escape(mark)} (.*)$", line)
        if behind and not re.search(r"[\"']", line[: behind.start()]):
            yield Text(number, behind[1])


def tests_of(text):
    """Where the tests of a Rust file begin: they are the file's last module."""
    match = re.search(r"^#\[cfg\(test\)\]\n(?:#\[[^\n]*\]\n)*mod \w+ \{", text, re.MULTILINE)
    return match.start() if match else len(text)


def literals(text):
    """String literals of a Rust source that are sentences or parts of one."""
    pattern = re.compile(r"//[^\n]*|r#\"(?P<raw>.*?)\"#|\"(?P<plain>(?:[^\"\\]|\\.)*)\"|'(?:[^'\\]|\\.)'", re.DOTALL)
    for match in pattern.finditer(text):
        literal = match["raw"] if match["raw"] is not None else match["plain"]
        if literal and " " in literal.strip():
            literal = re.sub(r"\\\n\s*", "", literal).replace("\\n", "\n").replace('\\"', '"')
            yield from (Text(text.count("\n", 0, match.start()) + 1, part) for part in literal.split("\n") if part.strip())


def values(lines):
    """Texts for people in a manifest: what alerts and dashboards say."""
    for number, line in enumerate(lines, 1):
        match = re.match(r"\s*(?:- )?(?:summary|description|message|title): (.*)", line)
        if match:
            yield Text(number, match[1].strip("'\""))


def texts(path, content):
    lines = content.splitlines()
    if path.suffix == ".md":
        yield from markdown(lines)
    elif path.suffix == ".rs":
        yield from comments(lines, "//")
        if path.parts[0] in ("src", "crates") and "tests" not in path.stem and "tests" not in path.parts and "testing" not in path.parts:
            yield from literals(content[: tests_of(content)])
    elif path.name in NAMED or path.suffix in COMMENT:
        yield from comments(lines, NAMED.get(path.name) or COMMENT[path.suffix])
        if path.suffix in (".yaml", ".yml"):
            yield from values(lines)


def problems(path, content, rules):
    for text in texts(path, content):
        prose = without_code(text.text)
        for pattern, _, instead in rules:
            for found in pattern.finditer(prose):
                yield text.line, f"{found[0]!r}: write {instead}"
        for sentence in SENTENCE_END.split(prose):
            sentence = sentence.strip()
            if QUESTION_WORDS.match(sentence) and not sentence.endswith("?"):
                yield text.line, f"a sentence begins with {sentence.split()[0]!r} and is no question: name the subject: {sentence[:60]!r}"
            count = len(re.findall(r"\w[\w'-]*|§", sentence))
            if count > MAX_WORDS:
                yield text.line, f"a sentence of {count} words, of at most {MAX_WORDS}: {sentence[:60]!r}"
    for number, line in enumerate(content.splitlines(), 1):
        # A row of a table and an address cannot be wrapped.
        if len(line) > MAX_WIDTH and path.suffix == ".md" and not line.lstrip().startswith("|") and "](http" not in line:
            yield number, f"a line of {len(line)} characters, of at most {MAX_WIDTH}"


def files():
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True)
    for name in sorted(set(listed.stdout.splitlines())):
        path = pathlib.Path(name)
        known = path.suffix in (".md", ".rs") or path.suffix in COMMENT or path.name in NAMED
        if known and not name.startswith(SKIPPED) and (ROOT / path).is_file():
            yield path


def self_test(rules):
    """Each rule rejects a text that breaks it, in each kind of file."""
    def found(name, text):
        return list(problems(pathlib.Path(name), text, rules))

    assert len(rules) >= 60, f"only {len(rules)} words"
    for pattern, source, instead in rules:
        # The pattern with its optional parts left out is a text that it matches.
        example = re.sub(r"\(\?:([^|)]*)(?:\|[^)]*)?\)\??", r"\1", re.sub(r"\[(.)[^]]*\]", r"\1", source)).replace("?", "")
        assert pattern.search(example), f"{source!r} does not match {example!r}"
        assert not pattern.search(without_code(f"`{example}`")), f"{source!r} matches code"
        for kind, text in {"page.md": f"A pod {example} it.\n", "src/a.rs": f"/// A pod {example} it.\n", "a.yaml": f"# A pod {example} it.\n"}.items():
            assert found(kind, text), f"{source!r} passes in {kind}"
        assert found("src/a.rs", f'warn!("a pod {example} it");\n'), f"{source!r} passes in a message"
        assert not found("page.md", f"The text `{example}` and \"{example}\" are quoted.\n"), f"{source!r}: a quotation is rejected"
    for text in ("Who asks is served.", "What is left is removed.", "Whoever calls is known."):
        assert found("page.md", text + "\n") and found("src/a.rs", f"//! {text}\n"), text
    assert not found("page.md", "What is served?\n")
    long = "A client " + "and a client " * 13 + "call."
    assert found("page.md", long + "\n") and found("src/a.rs", "// " + long + "\n") and found("a.yaml", f"summary: {long}\n")
    assert not found("page.md", long.replace(" and", ".\nAnd", 7) + "\n")
    assert found("page.md", "x" * (MAX_WIDTH + 1) + "\n")
    assert not found("page.md", "```\n" + "told nobody\n" + "```\n") and not found("src/a.rs", 'let told = "nobody";\n')


def main(arguments):
    rules = words()
    if arguments == ["--self-test"]:
        self_test(rules)
        return 0
    failed = 0
    paths = [pathlib.Path(name).resolve().relative_to(ROOT) for name in arguments] if arguments else files()
    for path in paths:
        for line, problem in problems(path, (ROOT / path).read_text(), rules):
            print(f"{path}:{line}: {problem}")
            failed += 1
    if failed:
        print(f"{failed} problems; CONTRIBUTING.md has the rules of prose", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
