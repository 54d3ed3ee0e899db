"""Learns what a result table lacks, and writes it into docs/results.

    python pipelines/reproduce/table.py NAME [--data DIR] [--seeds 0 1] [--rows treelora seqlora] [--jobs 2]

NAME is a file of pipelines/reproduce/tables; --data the folder with the text tasks, where the table needs it. A cell is
one row with one seed: once it is learnt, a small JSON file in docs/results/cells keeps it, and it is not learnt again
while code, config, data and backbone are what they were. What is broken off goes on with the same command. --any-code
takes cells of other code too; --again learns those that are there, and says how they compare; --dry only says what is
missing, and writes what is there.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # to be run as a file, too

from benchmarks import growth, paired, reach  # noqa: E402
from benchmarks.cells import Results, Table, further, kept, learn, read_table, results  # noqa: E402
from pipelines.reproduce import summary  # noqa: E402
from pipelines.reproduce.summary import RESULTS  # noqa: E402
from treelora_ray.tracking import comparison_table, figures  # noqa: E402
from treelora_ray.tracking.comparison_data import Found  # noqa: E402
from treelora_ray.tracking.comparison_report import all_figures, sentence  # noqa: E402

TABLES = Path(__file__).resolve().parent / "tables"


def write(table: Table, found: Found, more: Results, pages: Path) -> Path:
    """The table's page with its figures. `more`: cells of further seeds, which are compared seed by seed alone."""
    folder = pages / "figures" / table.name
    shutil.rmtree(folder, ignore_errors=True)  # a page may have no use for a figure of before
    folder.mkdir(parents=True)
    pictures = []
    for name, drawn in figures.draw(all_figures(found)).items():
        figures.save(drawn, folder / f"{name}.png", "png")
        pictures.append(f"![{name}](figures/{table.name}/{name}.png)")
    data = " --data DIR" if any(cell.config.stream.path for cell in table.cells) else ""
    told = results(found)
    commits = sorted({str(result["commit"])[:7] for result in told.values()})
    packages: dict[str, set[str]] = {}
    for result in told.values():
        for package, version in result["packages"].items():
            packages.setdefault(package, set()).add(version)
    versions = ", ".join(f"{package} {' or '.join(sorted(each))}" for package, each in packages.items())
    text = [
        f"# {table.title}",
        sentence(found),
        "\n".join(f"- {note}" for note in table.notes),
        f"Regenerate with `python pipelines/reproduce/table.py {table.name}{data}`.",
        comparison_table.markdown(found),
        paired.markdown(table, {**told, **more}),
        reach.markdown(table, told, [row for row in table.rows if row != paired.ALONE]) if table.families else "",
        growth.markdown(table, told) if table.growth else "",
        *pictures,
        f"Learnt at {', '.join(commits)} with {versions}.",
    ]
    path = pages / f"{table.name}.md"
    path.write_text("\n\n".join(part.strip() for part in text if part) + "\n")
    (pages / f"{table.name}.csv").write_text(comparison_table.as_csv(found))
    return path


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(path.stem for path in TABLES.glob("*.yaml")))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[])
    parser.add_argument("--rows", nargs="+", default=[])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "reproduce", help="where runs lie while they last")
    parser.add_argument("--any-code", action="store_true")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args(given)
    path = TABLES / f"{options.name}.yaml"
    asked = read_table(path, options.data, options.seeds, options.rows)
    failed = {}
    if not options.dry:
        failed = learn(asked, options.work, options.jobs, any_code=options.any_code, again=options.again)
    whole = read_table(path, options.data)
    found, more = kept(whole, options.any_code, failed), further(whole, options.any_code)
    if options.dry:
        missing = [cell["id"] for cell in found.cells if cell["state"] == "waiting"]
        missing += [cell.id for cell in whole.further if (cell.row, cell.seed) not in more]
        print("\n".join(f"missing: {name}" for name in missing))
    print(f"written: {write(whole, found, more, RESULTS)}")
    if whole.name in summary.STREAMS:
        summary.write(RESULTS)


if __name__ == "__main__":
    main()
