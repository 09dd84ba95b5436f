"""What the tests of plots share."""

import matplotlib.figure
import pytest


@pytest.fixture
def drawn(monkeypatch):
    """Figures as they are written."""
    figure = matplotlib.figure.Figure
    figures, savefig = [], figure.savefig

    def write(self, *given, **named):
        figures.append(self)
        return savefig(self, *given, **named)

    monkeypatch.setattr(figure, "savefig", write)
    return figures
