import pytest
from fake_cluster import make_cluster


@pytest.fixture
def cluster(tmp_path):
    """A cluster whose services are fakes."""
    return make_cluster(tmp_path)
