"""A Markdown extension: formulas become MathML while the site is built, so that a reader's browser needs no script.

It follows `pymdownx.arithmatex`, which finds the formulas.
"""

from html import unescape
from typing import Any
from xml.etree.ElementTree import Element

from latex2mathml.converter import convert_to_element
from markdown import Extension, Markdown
from markdown.treeprocessors import Treeprocessor

DELIMITERS = {r"\(": "inline", r"\[": "block"}


class FormulasToMathML(Treeprocessor):
    """Replaces the TeX in elements of the class `arithmatex`."""

    def run(self, root: Element) -> None:
        for element in root.iter():
            if element.get("class") != "arithmatex":
                continue
            text = unescape(element.text or "")
            element.text = None
            math = convert_to_element(text[2:-2].strip(), display=DELIMITERS[text[:2]], parent=element)
            for node in math.iter():
                node.text = None if node.text is None else unescape(node.text)  # it writes characters as entities
                if "\\" in (node.text or ""):
                    raise ValueError(f"latex2mathml must know every command of a formula; {node.text} is none: {text}")


class MathMLExtension(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        md.treeprocessors.register(FormulasToMathML(md), "mathml", 15)  # after inline patterns (20)


def makeExtension(**settings: Any) -> MathMLExtension:  # noqa: N802, the name that Markdown asks for
    return MathMLExtension(**settings)
