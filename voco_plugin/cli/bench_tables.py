"""The tables that ``voco bench`` prints, from its results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import output


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g}"


def _bytes(count: float | None) -> str:
    return "-" if count is None else output.human_bytes(count)


def attention(result: Mapping[str, Any]) -> str:
    cases = result["cases"]
    ways = list(cases[0]["seconds"])
    backends = list(cases[0]["mask_seconds"])
    header = ["frames", "tokens", *(f"{w} ms" for w in ways)]
    header += [f"dense/{w}" for w in ways if w != "dense"]
    header += [f"{b} mask" for b in backends] + [f"{b} mask ms" for b in backends] + ["floor ms"]
    rows = [
        [
            f"{c['frames']} x {c['vision_tokens']}", c["tokens"], *(_ms(c["seconds"][w]) for w in ways),
            *(c["faster_than_dense"][w] for w in ways if w != "dense"),
            *(_bytes(c["mask_bytes"][b]) for b in backends), *(_ms(c["mask_seconds"][b]) for b in backends),
            _ms(c["floor_seconds"]),
        ]
        for c in cases
    ]  # fmt: skip
    lines = [output.table(rows, header)]
    known = {name: value for name, value in result["slope"].items() if value is not None}
    if known:
        lines.append("slope of log time: " + ", ".join(f"{name} {v:.2f}" for name, v in known.items()))
    if "crossover" in result:
        start = result["crossover"]["segmented_from"]
        lines.append(
            "one image: segmented pays from "
            + (f"{start} tokens on" if start else "nowhere in the lengths that were measured")
        )
    return "\n".join(lines)


def train(result: Mapping[str, Any]) -> str:
    cases = result["cases"]
    ways = list(cases[0]["seconds"])
    header = ["images", "tokens", *(f"{w} ms" for w in ways), *(f"{w} / plain" for w in ways[1:])]
    header += [f"{w} GFLOPs" for w in ways]
    rows = [
        [
            c["images"], c["tokens"][ways[1]], *(_ms(c["seconds"][w]) for w in ways),
            *(c["ratio_to_plain"][w] for w in ways[1:]), *(f"{c['flops'][w] / 1e9:.4g}" for w in ways),
        ]
        for c in cases
    ]  # fmt: skip
    lines = [output.table(rows, header)]
    for case in cases:
        for way, seen in case.get("profile", {}).items():
            top = ", ".join(f"{o['operation']} {100 * o['share']:.0f} %" for o in seen[:5])
            lines.append(f"{case['images']} image(s), {way}: {top}")
    return "\n".join(lines)


_WAYS = ("no cache", "full caching", "VoCo", "floor")


def inference(result: Mapping[str, Any]) -> str:
    held = result["storage"]["bytes"]
    lines = []
    if "counted_flops" in result:
        paper = result["paper"]
        rows = [
            [
                way, _bytes(held.get(way)), f"{result['counted_flops'][way] / 1e12:.3f}",
                paper.get(way, {}).get("flops", 0) / 1e12 or None,
            ]
            for way in _WAYS
        ]  # fmt: skip
        lines.append(output.table(rows, ("way", "an image", "TFLOPs", "the paper's")))
    for case in result.get("first_token", ()):
        rows = [
            [
                way, _bytes(held.get(way)), _ms(case["seconds"][way]), case["ratio_to_floor"][way],
                f"{case['flops'][way] / 1e9:.4g}", _ms(case["floor_seconds"][way]),
            ]
            for way in _WAYS
        ]  # fmt: skip
        lines += [
            f"first token, {case['text_tokens']} text tokens, K = {case['num_tokens']}",
            output.table(rows, ("way", "an image", "ms", "/ floor", "GFLOPs", "their floor ms")), "",
        ]  # fmt: skip
    decoded = [
        [d["rows"][way], way, d["slots"][way], _ms(d["seconds"][way]), f"{d['tokens_per_second'][way]:.1f}",
         _bytes(d["kv_bytes"][way])]
        for d in result.get("decode", ()) for way in _WAYS if way in d["rows"]
    ]  # fmt: skip
    if decoded:
        header = ("batch", "decoding after", "slots", "ms a step", "tokens/s", "KV")
        lines += [output.table(decoded, header), ""]
    asked = [
        [r["images"], r["prompt_tokens"], *(r["requests_per_second"].get(way) for way in _WAYS[:3])]
        for r in result.get("requests", ())
    ]
    if asked:
        lines.append(output.table(asked, ("images", "tokens", *(f"{way} req/s" for way in _WAYS[:3]))))
    lines.append(
        f"{result['storage']['images_in_one_full']} cached images in the memory of one full-KV image"
    )
    return "\n".join(lines)


def context(result: Mapping[str, Any]) -> str:
    rows = []
    for r in result["rows"]:
        times = r["times"]["VoCo, compact"]
        rows.append(
            [
                r["family"], r["what"], r["vision_tokens"], f"{r['context']:,}", r["num_tokens"],
                *(f"{n:,}" for n in r["frames"].values()), "-" if times is None else f"{times:.0f}x",
            ]
        )  # fmt: skip
    header = (
        "family",
        "image or frame",
        "tokens",
        "context",
        "K",
        *result["rows"][0]["frames"],
        "compact/all",
    )
    return output.table(rows, header)


TABLES = {"attention": attention, "train": train, "inference": inference, "context": context}
