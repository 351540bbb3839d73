"""What pyproject.toml cannot say: the package's page has absolute links, and they follow one constant, ``ADDRESS``."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
ADDRESS = re.search(r'^ADDRESS = "(.*)"$', (ROOT / "minipaged" / "__init__.py").read_text("utf-8"), re.M)[1]


def absolute(readme: str) -> str:
    """The README with absolute links; without an address, the text of links to files, and no pictures."""

    def link(found: re.Match) -> str:
        picture, text, target = found.groups()
        if re.match(r"[a-z]+:|#", target):
            return found[0]
        if not ADDRESS:
            return "" if picture else text
        kind = "raw" if picture else "tree" if (ROOT / target.partition("#")[0]).is_dir() else "blob"
        return f"{picture}[{text}]({ADDRESS}/{kind}/main/{target})"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", link, readme)


if __name__ == "__main__":
    urls = {"Paper": "https://arxiv.org/abs/2309.06180"}
    if ADDRESS:
        urls |= {"Source": ADDRESS, "Issues": f"{ADDRESS}/issues", "Changelog": f"{ADDRESS}/blob/main/CHANGELOG.md"}
    setup(
        long_description=absolute((ROOT / "README.md").read_text("utf-8")),
        long_description_content_type="text/markdown",
        project_urls=urls,
    )
