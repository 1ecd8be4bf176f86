"""Texts that nobody honest would write, by kind: answers for the place of an answer, and whole completions.

None of them is an answer to `GOLD`; each has to be judged in time, without running anything and without a
trace.
"""

GOLD = "18"
CANARY = "ponder_canary"  # a file of this name in the working directory means that something was executed

_TOUCH = f"open('{CANARY}','w')"

ANSWERS = {
    "power towers": [
        "9**9**9", "9^9^9", "9^{9^{9}}", "9**9**9**9**9", "2^{2^{2^{2^{2^{2}}}}}", "10^{10^{10}}",
        "(9^9)^9^9", "x^{9^{9^9}}",
        "(1+x)^{1000000}", "(x+y+z)^{500}", "e^{e^{e^{e^{e^e}}}}", r"\sqrt[9999999]{2}",
        "2^{99999999999999}", "9e99999999", "1e-99999999",
        "1e999999999999999999999", r"10^{-10^{10}}", r"(\sqrt2+\sqrt3+\sqrt5+\sqrt7)^{99}",
        "^".join("9" * 100), "2^{-2^{-2^{-2^{99999}}}}",
        r"1.5\times10^{999999999}", "(((9^9)^9)^9)^9", r"\left(1+\frac{1}{10^9}\right)^{10^9}",
    ],
    "factorial bombs": [
        "99999999!", "9!!!!!!!!!!", "((9!)!)!", r"\binom{9999999}{4999999}", "1000000000!", "x!!!!", "5!!!!",
        r"\frac{100000!}{99999!}",
        r"\binom{10^9}{10^8}", "-5!", "0.5!", r"(10^{10})!", r"\Gamma(10^{10})", "171!!", "20!!",
    ],
    "big numbers": [
        "9" * 1_000, "9" * 5_000, "9" * 100_000, "1." + "3" * 5_000, "0." + "0" * 100_000 + "1",
        "1/" + "7" * 5_000, "1/" + "7" * 390, "1" + "0" * 4_299,
        "1" + "0" * 4_300, "1" + "0" * 4_301, "1" + ",000" * 2_000,
        r"\frac{" + "9" * 399 + "}{" + "7" * 399 + "}", r"\sqrt{" + "9" * 390 + "}",
        "+".join(["9" * 90] * 10), r"\sqrt{9999999967}", r"\sqrt{99999999999999999999999999999989}",
        r"\ln{99999999999999999999999999999989}",
        "*".join(["9" * 80] * 11), "-" + "9" * 10_000, "9" * 50 + "%",
    ],
    "nesting": [
        "{" * 10_000 + "5" + "}" * 10_000, "(" * 10_000 + "5" + ")" * 10_000, "[" * 10_000,
        r"\frac{" * 5_000, r"\sqrt{" * 200 + "2" + "}" * 200,
        r"\frac{1}{" * 100 + "2" + "}" * 100, "-" * 900 + "5", "|" * 900, "^" * 900, "_" * 900,
        "2^" * 400 + "2", r"\{" * 500, r"\pm" * 300 + "1", "x_{" * 300,
        r"\left(" * 300 + "1", "f(" * 300 + "x" + ")" * 300, r"\boxed{" * 2_000 + "5" + "}" * 2_000,
        "5" + "!" * 900, r"\sin" * 300 + "x", r"\sqrt" * 400 + "2",
        "1/" * 400 + "1", r"\lfloor" * 300, r"\overline{" * 300 + "1" + "}" * 300, "}" * 5_000,
        "5^" + "{" * 39 + "2" + "}" * 39,
    ],
    "nested functions": [
        "f(" * 28 + "x" + ")" * 28, "+".join(f"{name}(" * 28 + "x" + ")" * 28 for name in "fghfgh"),
        r"\sin(" * 28 + "x" + ")" * 28, "(1+x)^{" * 25 + "2" + "}" * 25, "2^{" * 25 + "x" + "}" * 25,
        r"\sqrt{1+" * 25 + "x" + "}" * 25, r"\ln(1+" * 28 + "x" + ")" * 28, "|1-" * 13 + "x" + "|" * 13,
        "*".join(["(a+b+c+d+f)^3"] * 20), "+".join(rf"\ln{{{9999999967 - 2 * k}}}" for k in range(60)),
    ],
    "long texts": [
        "a" * 1_000_000, "1" * 1_000_000, " " * 1_000_000, "$" * 1_000_000, "\\" * 1_000_000, "1 " * 500_000,
        "1," * 500_000, "x+" * 500_000 + "x", "," * 1_000_000,
        "\n" * 1_000_000, r"\text{" * 100_000, "answer is " * 100_000, "\\ " * 500_000, "~" * 1_000_000,
        ". " * 300_000, "A:" * 300_000, "#### " * 200_000,
        "the " * 250_000, "**" * 400_000, "is " * 300_000 + "5",
    ],
    "regex bait": [
        "a" * 5_000 + "!", "1" * 5_000 + "x", " " * 5_000 + "x", "1,111" * 900 + "x", r"\text{ " * 900 + "}",
        "answer" + " " * 50_000 + "x", "5 " + "a " * 400, "5" + " cm" * 300,
        "5 " + "a" * 900 + "^", "1 000 " * 100 + "x",
        r"5\ \ \ \ \ \ \ \ \ \ \ \ \ \ \ \ \ \ \ \ \ \ \ \ \ \ \ \ \ x^", "5" + r"\text{ cm}" * 90 + "!",
        "(" + "A" * 900, "5 " + "ab. " * 200 + "5",
        "$" * 500 + "5" + "$" * 499 + "x", "0" * 990 + "x", "1e" + "1" * 900,
    ],
    "code": [
        "__import__('os').system('touch " + CANARY + "')", _TOUCH, f"exec(\"{_TOUCH}\")",
        f"eval(\"{_TOUCH}\")", f"().__class__.__bases__[0].__subclasses__()[{_TOUCH}]",
        f"(lambda: {_TOUCH})()", "os.system('ls')", "import os; os._exit(1)", "raise SystemExit", "exit()",
        "quit()", "{{7*7}}", "${7*7}", "%s%s%s%n", "`touch " + CANARY + "`",
        "$(touch " + CANARY + ")", "; touch " + CANARY, "\\input{/etc/passwd}",
        "\\write18{touch " + CANARY + "}", "\\immediate\\write18{ls}", "\\def\\x{\\x\\x}\\x",
        "\\csname eval\\endcsname",
        "\\operatorname{__import__}(1)", "\\text{__import__('os').system('touch " + CANARY + "')}",
        f"\\sqrt{{{_TOUCH}}}", f"x_{{{_TOUCH}}}", "\\mathrm{exec}(1)", "lambda x: x",
        "[x for x in (1).__class__.__mro__]",
        "print(18)", "sympify('18')", "S(18)", "Symbol('x').__class__", "Function('f')(18).func",
        "18 if True else 0", "18;18", "{'a': 18}", "f'{18}'", "globals()['x']", "<script>alert(18)</script>",
        "' OR 1=1 --", "gAN9cQAu", "!!python/object/apply:os.system ['ls']", f"\\int_0^1 {_TOUCH} dx",
        "\\begin{python}1\\end{python}", "\\sum_{k=1}^{10^{12}} k", "\\prod_{k=1}^{10^{9}} k",
        "\\int_0^1 \\sin(\\sin(\\sin(\\sin(x^x))))\\,dx",
        "\\lim_{x\\to 0}\\frac{\\sin(\\tan(\\sin(x)))}{x^{99}}",
    ],
    "characters": [
        "１８", "١٨", "१८", "18\u0000", "\u0000", "\ud800", "18\udfff", "\u202e81", "1\u200b8", "18\ufeff",
        "①⑧", "¹⁸", "ⅩⅧ", "1\u03048", "𝟏𝟖", "\u0661\u0668", "十八", "🦆" * 1000,
        "\ufffd", "\x1b[31m18\x1b[0m", "18\x08\x08", "O8", "l8", "1８", "\u0660" * 100,
    ],
    "hedges": [
        "18 or 19", "17, 18, 19", "18 and 19", "18 or not 18", "either 18 or 20", r"18\text{ or }20",
        r"\{17,18\}", r"17\pm1", "18=19", "19=18", "17<18", "x=18 or x=19", "18, 19", "(18, 19)",
        "[18]=[19]", "18 to 20",
        "18-20", "18/19", "18 maybe 19", "18?19", "not 18", "18 is wrong", "between 17 and 19",
        "about 18 but 19", "17=18=18", "x=18, y=19", r"x\in\{18,19\}", r"[17,19]", r"x\ge18", "18 (or 19)",
        r"\neq 18", "18+19i",
        r"18\cup19", "18:19", "any number, 18 too", "-18", "18 of 20", r"18^{18}", "18 if x else 19",
    ],
}  # fmt: skip

COMPLETIONS = {
    "hedges": [
        "#### 19\n#### 18", "A: 18\nB: 19", "The answer is 19, no, the answer is 18.",
        "The answer is not: the answer is 18", "Answer: 19 Answer: 18", "The answer is 18 or 19",
        r"\boxed{18} \boxed{19}", r"\boxed{19} \boxed{18}", r"<answer>18</answer><answer>19</answer>",
        r"<answer>\boxed{18}\boxed{19}</answer>", r"<answer>19</answer> so \boxed{18}",
        "The answer is 18. The answer is 19.", "The answer is 19. The answer is 18.", "A: 18\nA: 19",
        r"\boxed{18}" + "".join(rf"\boxed{{{n}}}" for n in range(100)),
        "<answer>" + "</answer><answer>".join(map(str, range(19))) + "</answer>",
        "".join(f"<answer>{n}</answer>" for n in range(1000)) + "<answer>18</answer>",
    ],
    "tags out of place": [
        r"<think><think>x</think>\boxed{18}</think>", "<answer>1<think>x</think>8</answer>",
        r"\box<think>x</think>ed{18}", r"<thinking>\boxed{18}", r"<THINK>\boxed{18}",
        r"< Thought >\boxed{18}",
        "<reasoning>The answer is 18", "<ans<think>x</think>wer>18</answer>",
        "<think>18", r"<think>\boxed{18}", "<think><answer>18</answer>", "<think>the answer is 18</think>",
        "<think>#### 18</think>", r"<think>\boxed{18}</think>", "<think>a</think><think>b<answer>18</answer>",
        "18</think>", r"\boxed{18}</think>", "<answer>18", "</answer>18<answer>", "<answer></answer>",
        "<answer>   </answer>", "<think>a</think><answer></answer>18", r"\boxed{}", r"\boxed{18",
        r"\boxed 19{18}",
        "<think><think>a</think><answer>18</answer></think>x<think>", "<answer>19</answer></think>",
        "<think>a</think><answer><think>18</think></answer>", r"\boxed{\boxed{19}18}",
        "<answer>18<answer>19</answer>", "<|im_end|>18",
        "<think>" * 10_000 + "18", "</think>" * 10_000, "<answer>" * 10_000 + "18",
        "<answer>" * 100_000 + "</answer>", "<answer>" * 31 + "x" * 500_000, r"\boxed{" * 100_000,
        r"\boxed{" * 1_000 + "18", "####", "#### ", "#### \n18", "18 ####",
        "<think>" + "x" * 1_000_000 + "</think><answer>19</answer>", "x" * 1_900_000 + "<answer>19</answer>",
        "answer is" * 100_000, "", "The answer is 19." + "\n" * 19_000, "The answer is 19 " + "1." * 9_000,
        "Answer: 19. " + "; (" * 6_000, "answer is 19\n" * 1_500, "Answer: " * 2_400 + "19",
        "####1\n" * 3_000,
        r"-\boxed{1}" * 100_000, "<answer>" + "so the " * 140 + "19</answer>", "[THINK]" * 100_000,
        "<answer>" + "a, " * 330 + "</answer>", "<answer>" + " because" * 120 + "</answer>",
    ],
}  # fmt: skip
