"""README's results, from the JSON files in benches/results: bench-NAME.json of `--example bench -- --json` (the products),
and NAME.json of `MX_BENCH_JSON=... cargo bench --bench kernels` (quantization and dequantization).

    python3 benches/table.py           rewrites what stands between README.md's two markers
    python3 benches/table.py --check   fails if that would change anything
"""
import json
import pathlib
import statistics
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
# The case that numpy does too.
BASELINE = "quantize f32→mxfp4 rows nearest"
TIERS = ("exact", "tensor", "alu")
PEAKS = ("copy", "f32 fma", "packed dot", "cooperative matrix", "cooperative matrix of bytes")
# Pictures of the products that are shown if they are there.
PICTURES = (
    ("roofline.svg", "Rate over operations per byte of the products, under each machine's measured roofs"),
    ("cubes.svg", "Time over size of cubes"),
)
# Of software adapters these products suffice.
SOFTWARE_GROUPS = ("few and many tokens", "cubes")
FIELDS = ("microseconds", "gigabytes_per_second", "of_copy", "million_elements_per_second")


def merged(result):
    """Cases by name, in order; those measured more than once (the copy) by their medians."""
    cases = {}
    for case in result["cases"]:
        cases.setdefault(case["name"], []).append(case)
    return {
        name: {field: statistics.median(case[field] for case in same) for field in FIELDS}
        for name, same in cases.items()
    }


def number(value):
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def table(results):
    lines = ["| device | kernel | µs | GB/s | of the copy |", "|---|---|--:|--:|--:|"]
    for result in results:
        device = result["device"]
        for name, case in merged(result).items():
            lines.append(
                f"| {device} | {name} | {number(case['microseconds'])} | "
                f"{number(case['gigabytes_per_second'])} | {100 * case['of_copy']:.0f}% |"
            )
            device = ""  # Once a device.
    return lines


def conditions(result):
    """One line on how a device was measured."""
    rows, cols = result["shape"]
    clock = "the device's timestamps" if result["clock"] == "device" else "the host's clock"
    threads = f", {result['threads']} threads" if result["software"] else ""
    return (
        f"- {result['device']}: {result['backend']}, {result['driver']}{threads}; [{rows}, {cols}]; "
        f"{clock}; version {result['version']}."
    )


def against_numpy(result):
    case = merged(result).get(BASELINE)
    if case is None or not result.get("numpy"):
        return []
    numpy = statistics.median(run["million_elements_per_second"] for run in result["numpy"])
    versions = result["numpy"][0]
    ours = case["million_elements_per_second"]
    return [
        "",
        f"{result['device']}, {BASELINE}: {number(ours)} million elements a second, {ours / numpy:.1f} times the "
        f"{number(numpy)} of numpy {versions['numpy']} with ml_dtypes {versions['ml_dtypes']} "
        "(`benches/numpy_baseline.py`, one thread) on the same machine.",
    ]


def section(title, results):
    lines = ["", f"**{title}**", "", *table(results), "", *map(conditions, results)]
    for result in results:
        if result["backend"] == "Cpu":
            lines += against_numpy(result)
    return lines


def duration(seconds):
    for unit, name in ((1, "s"), (1e-3, "ms")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds * 1e6:.3g} µs"


def rate(value):
    for unit, name in ((1e12, "T"), (1e9, "G")):
        if value >= unit:
            value /= unit
            return f"{value:.0f} {name}" if value >= 100 else f"{value:.3g} {name}"
    return f"{value / 1e6:.3g} M"


def products(result, groups):
    """A row a product, a column a tier; and the tier that Tier::Auto takes, with what bounds it."""
    rows = {}
    for case in result["cases"]:
        if groups is None or case["group"] in groups:
            experts = f"{case['experts']} experts, " if case["experts"] else ""
            key = (
                f"{experts}{case['m']} × {case['n']} × {case['k']}",
                f"{case['a']} × {case['b']}",
            )
            rows.setdefault(key, {})[case["tier"]] = case
    lines = [
        f"| m × n × k | a × b | {' | '.join(TIERS)} | `Tier::Auto` is bound by |",
        "|---|---|--:|--:|--:|---|",
    ]
    for (shape, operands), tiers in rows.items():
        cells, auto = [], ""
        for tier in TIERS:
            case = tiers.get(tier)
            if case is None:
                cells.append("–")
                continue
            share = "" if case["share"] is None else f", {100 * case['share']:.0f}%"
            text = f"{duration(case['seconds'])}, {rate(case['flops'] / case['seconds'])}{share}"
            if case["auto"]:
                auto = f"{tier}: {case['bound']}"
            cells.append(text)
        lines.append(f"| {shape} | {operands} | {' | '.join(cells)} | {auto} |")
    return lines


def product_section(results):
    lines = []
    for result in results:
        peaks = []
        for name in PEAKS:
            peak = result["peaks"].get(name)
            if peak is None:
                # The file is older than this peak.
                continue
            if "lacking" in peak:
                peaks.append(f"{name}: lacking")
            elif "bytes_per_second" in peak:
                peaks.append(f"{name} {number(peak['bytes_per_second'] / 1e9)} GB/s")
            else:
                peaks.append(f"{name} {rate(peak['operations_per_second'])}FLOP/s")
        clock = "the device's timestamps" if result["clock"] == "device" else "the host's clock"
        threads = f", {result['threads']} threads" if result["software"] else ""
        lines += [
            "",
            f"{result['device']} ({result['backend']}, {result['driver']}{threads}; {clock}; version "
            f"{result['version']}). Measured peaks: {', '.join(peaks)}.",
            "",
            *products(result, SOFTWARE_GROUPS if result["software"] else None),
        ]
        if result["lacking"]:
            # The same reason for every kind of product, mostly.
            reasons = {}
            for lack in result["lacking"]:
                reasons[lack["reason"]] = reasons.get(lack["reason"], 0) + lack["cases"]
            listed = "; ".join(f"{reason} ({cases} cases)" for reason, cases in reasons.items())
            lines += ["", f"Lacking: {listed}."]
    return lines


def main():
    files = sorted((ROOT / "benches" / "results").glob("*.json"))
    # Those of `--example info -- --native --evidence` are quoted by hand.
    files = [file for file in files if not file.name.startswith("native-")]
    # Two kinds of files; those of products have their kind in them, and in their name.
    everything = [(path.name, json.loads(path.read_text(encoding="utf-8"))) for path in files]
    for name, result in everything:
        if (result.get("kind") == "bench") != name.startswith("bench-"):
            sys.exit(f"benches/results/{name}: results of --example bench, and only they, are called bench-*.json")
    benches = [r for _, r in everything if r.get("kind") == "bench"]
    results = [r for _, r in everything if r.get("kind") != "bench"]
    lines = []
    for title, software in (("GPUs", False), ("Software adapters and the CPU engine", True)):
        part = [r for r in benches if r["software"] == software]
        if part:
            lines += ["", f"**Matrix products: {title}**", *product_section(part)]
    for picture, text in PICTURES:
        if (ROOT / "benches" / "results" / picture).exists():
            lines += ["", f"![{text}](benches/results/{picture})"]
    gpus = [r for r in results if not r["software"]]
    software = [r for r in results if r["software"]]
    if gpus:
        lines += section("Quantization: GPUs", gpus)
    if software:
        lines += section("Quantization: software adapters and the CPU engine", software)
    if not everything:
        lines = ["", "None recorded yet."]

    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        sys.exit(f"README.md must hold {BEGIN} and then {END}, once each")
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    new = head + BEGIN + "\n" + "\n".join(lines) + "\n\n" + END + tail
    if "--check" in sys.argv[1:]:
        if new != text:
            sys.exit("README.md's tables are not those of benches/results: run python3 benches/table.py")
    elif new != text:
        readme.write_text(new, encoding="utf-8")
        print(f"README.md: {len(everything)} results")


if __name__ == "__main__":
    main()
