"""Grid files that are wrong: each with a part of the one line that must tell it.

FILES stand for themselves. VALUES, KEYS and LACKING are put into real grids.
"""

import itertools
import math

SECONDS = 3  # of CPU time in which planning refuses any of them

_LETTERS = "abcdefghij"
BILLION_LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{c}: &{c} [{', '.join([f'*{p}'] * 9)}]\n" for p, c in itertools.pairwise(_LETTERS)
)
MERGED_LAUGHS = "a: &a {x: 1, y: 2, z: 3}\n" + "".join(
    f"{c}: &{c} {{<<: [{', '.join([f'*{p}'] * 30)}]}}\n" for p, c in itertools.pairwise(_LETTERS)
)
DEFINED_LAUGHS = "define: {d9: 1, " + ", ".join(f"d{i}: [{', '.join([f'$d{i + 1}'] * 9)}]" for i in range(9)) + "}\n"
CHAIN = "define: {d500: 1, " + ", ".join(f"d{i}: $d{i + 1}" for i in range(500)) + "}\nmodels: $d0\n"

FILES: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "a grid file is a mapping of settings; this one is empty"),
    "spaces": ("  \n\n", "this one is empty"),
    "comments": ("# nothing\n" * 9, "this one is empty"),
    "list": ("- a\n- b\n", "this one is a list"),
    "text": ("hello\n", "this one is a str"),
    "number": ("3\n", "this one is a int"),
    "null": ("null\n", "this one is empty"),
    "utf-16": ("models: a\n".encode("utf-16"), "byte 0 is 0xff: not UTF-8 text"),
    "latin-1": (b"title: caf\xe9\n", "byte 10 is 0xe9: not UTF-8 text"),
    "zeros": (b"\0" * 99, "unacceptable character #x0000"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "byte 0 is 0x89: not UTF-8 text"),
    "a pickle": (b"\x80\x04\x95\x0a\x00\x00\x00", "byte 0 is 0x80: not UTF-8 text"),
    "tab": ("models:\tx\n\tname: y\n", "found character '\\t' that cannot start any token"),
    "tab in a list": ("compression:\n\t- dense\n", "line 2, column 1: found character '\\t'"),
    "key twice": ("models: a\nmodels: b\n", "line 2, column 1: the key 'models' appears twice"),
    "key twice within": ("models: {name: a, name: b}\n", "line 1, column 19: the key 'name' appears twice"),
    "key twice in quotes": ("models: a\n'models': b\n", "the key 'models' appears twice"),
    "billion laughs": (BILLION_LAUGHS, "more than 10,000 values"),
    "laughs in merge keys": (MERGED_LAUGHS, "more than 10,000 values"),
    "laughs in definitions": (DEFINED_LAUGHS + "models: $d0\n", "define: written out"),
    "a chain of definitions": (CHAIN, "more than 40 definitions that stand for each other"),
    "anchor in itself": ("models: &a [*a]\n", "found unconstructable recursive node"),
    "mapping in itself": ("models: &a {name: *a}\n", "found unconstructable recursive node"),
    "whole file in itself": ("&a [*a]\n", "an anchor that stands for something with itself inside"),
    "unknown anchor": ("models: *x\n", "found undefined alias 'x'"),
    "brackets without end": ("models: " + "[" * 20_000, "more than 40 mappings and lists within each other"),
    "deep lists": ("models: " + "[" * 100 + "]" * 100, "more than 40 mappings and lists within each other"),
    "deep mappings": ("models: " + "{a: " * 5_000, "more than 40 mappings and lists within each other"),
    "deep blocks": ("".join(f"{' ' * i}a:\n" for i in range(300)), "more than 40 mappings and lists within each other"),
    "a huge list": ("models: [" + "x, " * 15_000 + "x]", "more than 10,000 values"),
    "a huge mapping": ("".join(f"k{i}: 1\n" for i in range(6_000)), "more than 10,000 values"),
    "a huge file": ("# comment\n" * 30_000, "more than 262,144 bytes"),
    "a huge key": ("x" * 5_000 + ": 1\n", "line 1, column 5001: mapping values are not allowed here"),
    "a number of many digits": ("models: " + "9" * 9_000, "whole numbers are below 2^63"),
    "a hexadecimal of many digits": ("models: 0x" + "f" * 9_000, "whole numbers are below 2^63"),
    "a time of many parts": ("models: 1" + ":1" * 9_000, "whole numbers are below 2^63"),
    "an octal of many digits": ("models: 0" + "7" * 60, "whole numbers are below 2^63"),
    "python object": ("models: !!python/object/apply:os.system [true]\n", "the tag 'tag:yaml.org,2002:python/object"),
    "python name": ("!!python/name:os.system\n", "the tag 'tag:yaml.org,2002:python/name"),
    "own tag": ("models: !mine x\n", "the tag '!mine'"),
    "set": ("models: !!set {a, b}\n", "the tag 'tag:yaml.org,2002:set'"),
    "binary": ("models: !!binary aGVsbG8=\n", "the tag 'tag:yaml.org,2002:binary'"),
    "no bool": ("models: !!bool abc\n", "the tag 'tag:yaml.org,2002:bool'"),
    "no date": ("models: !!timestamp 2001-99-99\n", "the tag 'tag:yaml.org,2002:timestamp'"),
    "pairs": ("models: !!omap [a: 1]\n", "the tag 'tag:yaml.org,2002:omap'"),
    "list as key": ("? [a, b]\n: c\n", "line 1, column 3: the key is read as seq"),
    "mapping as key": ("? {a: b}\n: c\n", "the key is read as map"),
    "number as key": ("1: 2\n", "the key 1 is read as int, not as text: put it in quotes"),
    "null as key": ("null: 2\n", "the key null is read as null"),
    "on as key": ("on: 2\n", "the key on is read as bool"),
    "equals as key": ("=: 3\n", "the key = is read as value"),
    "control character in a key": ('"a\\x1b[2Jb": 1\n', "the control character U+001B has no place in a key"),
    "newline in a study's name": ('studies: {"a\\nb": {}}\n', "the control character U+000A has no place in a key"),
    "merge of a number": ("<<: 3\n", "expected a mapping or list of mappings for merging"),
    "merge of a list": ("<<: [3]\n", "expected a mapping for merging"),
    "two documents": ("a: 1\n---\nb: 2\n", "found another document"),
    "future YAML": ("%YAML 3.0\n---\na: 1\n", "found incompatible YAML document"),
    "open bracket": ("a: [1\n", "expected ',' or ']'"),
    "open brace": ("a: {b\n", "expected ',' or '}'"),
    "open quote": ("a: 'x\n", "found unexpected end of stream"),
    "colon in a colon": ("a: b: c\n", "mapping values are not allowed here"),
    "at": ("a: @b\n", "found character '@'"),
    "backtick": ("a: `b`\n", "found character '`'"),
    "ampersand": ("a: &\n", "expected alphabetic or numeric character"),
    "unknown escape": ('a: "\\q"\n', "found unknown escape character 'q'"),
    "no character": ('a: "\\U00110000"\n', "a value that cannot be read"),
    "surrogate": ('models: "\\ud800"\n', "models = '\\ud800': the control character U+D800"),
    "terminal sequence": ('models: "a\\x1b[31mb"\n', "models = 'a\\x1b[31mb': the control character U+001B"),
    "text turned around": ('models: "a\\u202eb"\n', "the control character U+202E has no place in a text"),
    "raw escape": (b"models: a\x1b[31m\n", "unacceptable character #x001b"),
    "raw C1": (b"models: \xc2\x9b31m\n", "unacceptable character #x009b"),
    "raw delete": (b"models: a\x7f\n", "unacceptable character #x007f"),
    "extends nothing": ("extends: nope\n", "unknown grid 'nope'"),
    "extends a list": ("extends: [demo]\n", "extends = ['demo']: a grid, or"),
    "extends null": ("extends: null\n", "extends = None: a grid, or"),
    "extends itself": ("extends: grid\n", "extends = 'grid' comes back to itself"),
    "extends a device": ("extends: /dev/zero\n", "the grid file '/dev/zero' is no file"),
    "extends a long name": ("extends: " + "y" * 300, "unknown grid 'yyyy"),
    "extends a null byte": ('extends: "\\0"\n', "unknown grid '\\x00'"),
    "extends without a mapping": ("extends: {grid: demo, without: {a: 1}}\n", "extends = {'grid': 'demo', 'without'"),
    "extends without lists": ("extends: {grid: demo, without: [[a]]}\n", "extends = {'grid': 'demo', 'without'"),
    "extends without what is not there": ("extends: {grid: demo, without: modles}\n", "did you mean 'models'"),
    "definitions are a number": ("define: 3\n", "define = 3: a mapping of names"),
    "definitions are a list": ("define: [a]\n", "define = ['a']: a mapping of names"),
    "definition of itself": ("define: {a: [$a]}\nmodels: $a\n", "the definition comes back to itself"),
    "definitions in a circle": ("define: {a: $b, b: $a}\n", "the definition comes back to itself"),
    "from itself": ("define: {a: {from: $a}}\n", "the definition comes back to itself"),
    "unknown definition": ("models: $nope\n", "models = '$nope': unknown definition 'nope'"),
    "from an unknown one": ("models: {from: $nope}\n", "models.from = '$nope': unknown definition 'nope'"),
    "from no definition": ("models: {from: demo}\n", "models.from = 'demo': must name the definition of a mapping"),
    "studies are a number": ("studies: 3\n", "studies = 3: a mapping of study names"),
    "studies are empty": ("studies: {}\n", "studies = {}: a mapping of study names"),
    "studies are null": ("studies: null\n", "studies = None: a mapping of study names"),
    "a study is a number": ("studies: {a: 3}\n", "studies.a = 3: a mapping; allowed keys"),
    "a study is null": ("studies: {a: null}\n", "studies.a = None: a mapping; allowed keys"),
    "a part of a study is a list": ("studies: {a: [[]]}\n", "studies.a[0] = []: a mapping; allowed keys"),
    "a study without parts": ("studies: {a: []}\n", "no cell comes out of this grid"),
    "nothing but a description": ("description: x\n", "models is missing (and in 1 more place)"),
}

WRONG_COUNTS = (-1, 0, 1e30, 2.5, 10**10, 10**18, math.nan, math.inf, "x", "5", True, {"a": 1}, [])
WRONG_NUMBERS = (-1, 0, 1e30, math.nan, -math.inf, "fast", "1e-3x", {"a": 1}, [])
WRONG_CHOICES = ("x", "", 3, True, {"a": 1}, [], [["x"]])
WRONG_NAMES = (3, True, "no such", "y" * 300, "y" * 5000, "/no/such", "~nobody-here/x", "a\0b", [], {"a": 1})

# Place in demo.yaml -> values that it cannot have.
VALUES: dict[tuple[str | int, ...], tuple[object, ...]] = {
    ("description",): (3, ["a"], {"a": 1}, math.inf),
    ("models",): (*WRONG_NAMES[:-1], None, {"name": 3}, "package:no.such/x.gguf", "package:../x", ".", "/etc"),
    ("compression",): ("x", "gptqq", 3, {}, {"method": 3}, {"method": ["x"]}, None, []),
    ("compression", 1, "sparsity"): (-0.5, 0, 1, 1e30, math.nan, "half", [], {"a": 1}),
    ("compression", 2, "bits"): (*WRONG_COUNTS, 5),
    ("compression", 2, "damping"): (*WRONG_NUMBERS, 2),
    ("compression", 2, "sym"): ("yes please", 1, "x", {"a": 1}, []),
    ("compression", 2, "group_size"): WRONG_COUNTS,
    ("calibration",): (None, 3, "x", {}, []),
    ("calibration", "dataset"): WRONG_NAMES,
    ("calibration", "split"): WRONG_CHOICES,
    ("calibration", "seq_len"): (*WRONG_COUNTS, 1),
    ("calibration", "seed"): (-1, 1e30, 2.5, "x"),
    ("calibration", "skip"): (-1, 1e30, 10**10),
    ("calibration", "revision"): (3, {"a": 1}, "abc"),
    ("sources",): ("gptq-4bit", 3, {"a": 1}),
    ("targets",): ("gptq-4bit", [["dense"]], 3),
    ("transfer",): WRONG_CHOICES[:-1],
    ("recovery", 0, "method"): (*WRONG_CHOICES[:4], "soft-prompt", None),
    ("recovery", 0, "k"): (*WRONG_COUNTS, 9000),
    ("recovery", 0, "steps"): WRONG_COUNTS,
    ("recovery", 0, "batch"): WRONG_COUNTS,
    ("recovery", 0, "lr"): WRONG_NUMBERS,
    ("recovery", 0, "schedule"): WRONG_CHOICES,
    ("recovery", 0, "precision"): WRONG_CHOICES,
    ("recovery", 0, "accumulate"): (3, 0, "x"),
    ("recovery", 0, "init_text"): ("x", 3),
    ("recovery", 0, "validation"): (3, "x", {"split": "train"}, {"split": "test"}),
    ("measures", 0, "method"): (*WRONG_CHOICES[:4], "perplexitty"),
    ("measures", 0, "text", "count"): WRONG_COUNTS,
    ("measures", 0, "text", "seq_len"): (*WRONG_COUNTS, 9000),
    ("plugins",): (3, "no.such.module", "nothing.py", "y" * 300 + ".py", "a\0.py"),
    ("datasets",): (3, ["a"], {"own": 3}, {"own": {}}, {"own": {"path": 3}}, {"own": {"pth": "x"}},
                    {"c4": {"path": "x"}},
                    {"../x": {"path": "x"}}, {"own": {"hub": "a/b", "data_files": 3}},
                    {"own": {"hub": "a/b", "data_files": {"train": 3}}}),
}  # fmt: skip

# Place of a key in demo.yaml whose name is mistyped.
KEYS: tuple[tuple[str | int, ...], ...] = (
    ("models",), ("calibration",), ("recovery",), ("measures",), ("sources",), ("description",),
    ("compression", 1, "sparsity"), ("compression", 2, "bits"), ("calibration", "seq_len"), ("recovery", 0, "steps"),
    ("recovery", 0, "validation", "count"), ("recovery", 0, "precision"), ("measures", 0, "text", "split"),
)  # fmt: skip

# Place of a key in demo.yaml that cannot be left out.
LACKING: tuple[tuple[str | int, ...], ...] = (
    ("models",), ("compression",), ("calibration",), ("compression", 2, "bits"), ("compression", 2, "method"),
    ("calibration", "dataset"), ("calibration", "split"), ("calibration", "seq_len"), ("recovery", 0, "text"),
    ("recovery", 0, "method"), ("recovery", 0, "text", "dataset"), ("measures", 0, "text"), ("measures", 0, "method"),
)  # fmt: skip
