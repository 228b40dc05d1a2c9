"""How a report lists what was left out, for prepack_ and the integrations."""


def lines_by_reason(title: str, reasons: dict[str, str]) -> list[str]:
    """Return a line for each reason in {name: reason}: how many have it, and the first of them."""
    lines = []
    for reason in dict.fromkeys(reasons.values()):
        names = [name for name, its in reasons.items() if its == reason]
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        lines.append(f"{title} {len(names)}: {reason} ({shown})")
    return lines
