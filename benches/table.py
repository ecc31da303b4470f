"""README's results, from the JSON files that `MX_BENCH_JSON=benches/results/NAME.json cargo bench` writes.

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


def main():
    files = sorted((ROOT / "benches" / "results").glob("*.json"))
    results = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    gpus = [r for r in results if not r["software"]]
    software = [r for r in results if r["software"]]
    lines = []
    if gpus:
        lines += section("GPUs", gpus)
    if software:
        lines += section("Software adapters and the CPU engine", software)
    if not results:
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
        print(f"README.md: {len(results)} results")


if __name__ == "__main__":
    main()
