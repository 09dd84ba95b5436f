import matplotlib.figure
import pytest


@pytest.fixture
def drawn(monkeypatch):
    """Figures that were written to files."""
    figure = matplotlib.figure.Figure
    figures, savefig = [], figure.savefig

    def write(self, *args, **kwargs):
        figures.append(self)
        return savefig(self, *args, **kwargs)

    monkeypatch.setattr(figure, "savefig", write)
    return figures
