"""This module prints the methods of the comparisons as Markdown tables: `python -m eval.methods`."""

from . import METHODS, WITHOUT_ROW


def tables() -> str:
    """Return Markdown with one table of `METHODS` for adapters, one for weights, and the list `WITHOUT_ROW`."""
    lines = []
    for trains in ("adapter", "weights"):
        lines += [f"## Methods that train {'an adapter' if trains == 'adapter' else 'weights'}", ""]
        state = " bytes of state of a float32 p×q matrix |" if trains == "weights" else ""
        lines += [
            f"| name | method | published in | package |{state} note |",
            f"|---|---|---|---|{'---|' if state else ''}---|",
        ]
        for name, method in METHODS.items():
            if method.trains == trains:
                held = f" `{method.state}` |" if state else ""
                lines.append(
                    f"| `{name}` | {method.title} | {method.paper} | {method.package or ''} |{held} {method.note} |"
                )
        lines.append("")
    lines += ["## Methods without a row", "", *(f"* {name}: {reason}." for name, reason in WITHOUT_ROW.items())]
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables())
