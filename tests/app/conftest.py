import pytest
from two_stages import write_configs


@pytest.fixture
def configs(tmp_path, text_encoder):
    return write_configs(tmp_path, text_encoder)


@pytest.fixture(scope="module")
def ckpt(bundle, tmp_path_factory) -> str:
    """The smallest model in a file: f4, trained at 32 x 32, as it says."""
    path = tmp_path_factory.mktemp("model") / "tiny.ckpt"
    bundle.save(path)
    return str(path)
