"""Finds what can be mutated in a CUDA kernel file, and rewrites the file so that it holds every mutant at once.

Mutated are the barriers and waits (left out), and in device code every comparison by <, <=, > or >= that decides
something: a term of an `if`, of a ?: or of a bool is off by one, or is taken to be what lets the guarded code run; a
min() or max() is one of its arguments. The condition of a loop is only made off by one. The mutant that runs is the one
whose number is in a global variable; the others note whether they would have differed (mutants.h).

This reads C++ as clang-format writes it, with spaces around binary operators and none inside template brackets.
"""

import re
from dataclasses import dataclass

BARRIER = re.compile(
    r"\b(?:ptx::)?((?:__sync(?:threads|warp)|__threadfence\w*|fence_\w+|bar_\w+|\w+_(?:wait|commit|arrive)\w*)"
    r"(?:<[^<>]*>)?)\("
)
VOTE = re.compile(r"\b__syncthreads_(?:and|or|count)\(")
COMPARISON = re.compile(r"\s(<=|>=|<|>)\s")
CHECK = re.compile(r"!?[\w.]*\bis_\w+\(.*\)", re.DOTALL)  # a call like is_inside(i, size)
OFF_BY_ONE = {"<": "<=", "<=": "<", ">": ">=", ">=": ">"}
ANNOTATION = "// redundant: "
INCLUDE = '#include "mutants.h"\n#line 1\n'


@dataclass
class Mutant:
    number: int
    file: str
    line: int
    what: str
    redundant: str = ""  # the reason that the source gives


@dataclass
class Edit:
    """text[start:end] becomes this, where @0, @1 … stand for the numbers of the mutants."""

    start: int
    end: int
    text: str
    whats: tuple


def without_comments(text):
    """The same text with blanks for comments and strings, so that positions stay."""
    pattern = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"'
    return re.sub(pattern, lambda m: re.sub(r"[^\n]", " ", m[0]), text, flags=re.DOTALL)


def closing(text, start):
    """The position of the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0:
            return i
    raise ValueError(f"no closing bracket: {text[start : start + 60]!r}")


def device_code(text):
    """(start, end) of the body of each __global__ or __device__ function."""
    at = 0
    while match := re.compile(r"\b__(?:global|device)__\b").search(text, at):
        at = match.end()
        while text[at] not in "{;":
            at = closing(text, at) + 1 if text[at] == "(" else at + 1
        if text[at] == "{":
            end = closing(text, at)
            yield at, end
            at = end


def stretch(text, start, stops):
    """Where the expression from `start` ends: at one of `stops` outside of brackets, or at a closing bracket."""
    i = start
    while text[i] not in stops + ")]}":
        i = closing(text, i) + 1 if text[i] in "([{" else i + 1
    return i


def before_question(text, end):
    """Where the condition starts that the ? at `end` asks."""
    i = end - 1
    while True:
        if text[i] in ")]}":
            depth = 0
            while True:
                depth += (text[i] in ")]}") - (text[i] in "([{")
                if depth == 0:
                    break
                i -= 1
        elif text[i] in "([{;,?}" or (text[i] == ":" and ":" not in (text[i - 1], text[i + 1])):
            return i + 1
        elif text[i] == "=" and text[i - 1] == " " and text[i + 1] in " \n":
            return i + 1
        elif text.startswith("return ", i):
            return i + len("return ")
        i -= 1


def split(text, start, end, operator):
    """The stretches of text[start:end] between the operators that are outside of brackets."""
    parts, i, first = [], start, start
    while i < end:
        if text[i] in "([{":
            i = closing(text, i)
        elif text.startswith(operator, i):
            parts.append((first, i))
            i += len(operator)
            first = i
            continue
        i += 1
    return [*parts, (first, end)]


def terms(text, start, end):
    """The stretches of a condition that && and || connect, without blanks and outer brackets."""
    while text[start].isspace():
        start += 1
    while text[end - 1].isspace():
        end -= 1
    for operator in ("||", "&&"):
        parts = split(text, start, end, operator)
        if len(parts) > 1:
            return [term for part in parts for term in terms(text, *part)]
    if text[start] == "(" and closing(text, start) == end - 1:
        return terms(text, start + 1, end - 1)
    return [(start, end)]


def conditions(text, start, end):
    """(start, end, removed) of the conditions in a function's body; removed is what the absent term is: "true",
    "false", or "" for the condition of a loop."""
    for match in re.compile(r"\bif \(").finditer(text, start, end):
        close = closing(text, match.end() - 1)
        rest = text[close + 1 : close + 80].lstrip(" {\n")
        leaves = re.match(r"(return|continue|break)\b", rest)
        clamps = re.match(r"(\w+) = \w+;", rest) and rest.split()[0] in text[match.end() : close].split()
        yield match.end(), close, "false" if leaves or clamps else "true"
    for match in re.compile(r"\bfor \(").finditer(text, start, end):
        if text[: match.start()].rstrip().endswith("#pragma unroll"):
            continue  # of constant length
        first = stretch(text, match.end(), ";") + 1
        last = stretch(text, first, ";")
        if re.search(r"\+\+|\+=", text[last : closing(text, match.end() - 1)]):
            yield first, last, ""
    for match in re.compile(r"\bwhile \(").finditer(text, start, end):
        yield match.end(), closing(text, match.end() - 1), ""
    for match in re.compile(r" \?\s").finditer(text, start, end):
        yield before_question(text, match.start()), match.start(), "true"
    for match in re.compile(r"(?: =|\breturn)\s").finditer(text, start, end):
        finish = stretch(text, match.end(), ",;")
        if "?" not in text[match.end() : finish] and "{" not in text[match.end() : finish]:
            yield match.end(), finish, "true"


def is_constant(text, start):
    """Whether the statement around is a constexpr or a static_assert."""
    statement = max(text.rfind(c, 0, start) for c in ";{}")
    return re.search(r"\bconstexpr\b|\bstatic_assert\b", text[statement:start]) is not None


def flat(text):
    return " ".join(text.split())


def edits_of_condition(text, start, end, removed):
    parts = terms(text, start, end)
    if not removed and len(parts) > 1:
        removed = "true"  # the loop still has the other terms
    for first, last in parts:
        term = text[first:last]
        found = [m for m in COMPARISON.finditer(text, first, last) if outside(text, first, m.start())]
        new, whats = term, ()
        if len(found) == 1:
            (match,) = found
            other = OFF_BY_ONE[match[1]]
            left, right = text[first : match.start()], text[match.end() : last]
            new = f"fastconv_mutate(@0, {term}, {left} {other} {right})"
            whats = (f"{other} in `{flat(term)}`",)
        elif not CHECK.fullmatch(term):
            continue
        if removed:
            new = f"fastconv_mutate(@{len(whats)}, {new}, {removed})"
            whats += (f"without `{flat(term)}`",)
        if whats:
            yield Edit(first, last, new, whats)


def outside(text, start, at):
    """Whether text[at] is outside of the brackets that open after `start`."""
    return sum((c in "([{") - (c in ")]}") for c in text[start:at]) == 0


def edits_of_file(text):
    code = without_comments(text)
    found = {}
    for start, end in device_code(code):
        for match in BARRIER.finditer(code, start, end):
            close = closing(code, match.end() - 1) + 1
            if code[close] != ";" or code[: match.start()].rstrip()[-1] not in ";{})":
                continue  # not a statement
            new = f"if (fastconv_mutate(@0, true, false)) {code[match.start() : close]}"
            found[match.start(), close] = Edit(match.start(), close, new, (f"no {match[1]}",))
        for match in VOTE.finditer(code, start, end):
            close = closing(code, match.end() - 1)
            call, argument = code[match.start() : close + 1], code[match.end() : close]
            new = f"(fastconv_mutate(@0, true, false) ? {call} : int({argument}))"
            found[match.start(), close + 1] = Edit(match.start(), close + 1, new, (f"no {call}",))
        for match in re.compile(r"(?<![\w:])(min|max)\(").finditer(code, start, end):
            close = closing(code, match.end() - 1)
            a, b = (code[i:j].strip() for i, j in split(code, match.end(), close, ","))
            call, operator = code[match.start() : close + 1], "<" if match[1] == "min" else ">"
            new = f"(fastconv_mutate(@1, fastconv_mutate(@0, {b} {operator} {a}, true), false) ? {b} : {a})"
            whats = (f"`{flat(b)}` for `{flat(call)}`", f"`{flat(a)}` for `{flat(call)}`")
            found[match.start(), close + 1] = Edit(match.start(), close + 1, new, whats)
        for first, last, removed in conditions(code, start, end):
            if not is_constant(code, first):
                for edit in edits_of_condition(code, first, last, removed):
                    found.setdefault((edit.start, edit.end), edit)
    return [found[span] for span in sorted(found)]


def annotation(lines, line):
    """The reason given at the end of a line (counted from 1), or in a comment before it."""
    for text in (lines[line - 1], lines[line - 2].strip() if line > 1 else ""):
        if ANNOTATION in text and (text is lines[line - 1] or text.startswith("//")):
            return text.partition(ANNOTATION)[2]
    return ""


def rewrite(path, first_number):
    """(the text of a file with its mutants, the mutants), numbered from `first_number`."""
    text = path.read_text()
    lines, mutants, pieces, at = text.splitlines(), [], [], 0
    for edit in edits_of_file(text):
        if edit.start < at:
            continue  # inside of another
        line = text.count("\n", 0, edit.start) + 1
        numbers = [first_number + len(mutants) + i for i in range(len(edit.whats))]
        for number, what in zip(numbers, edit.whats, strict=True):
            mutants.append(Mutant(number, path.name, line, what, annotation(lines, line)))
        new = edit.text
        for i, number in enumerate(numbers):
            new = new.replace(f"@{i}", str(number))
        pieces += [text[at : edit.start], new]
        at = edit.end
    return INCLUDE + "".join([*pieces, text[at:]]), mutants
