import pytest
from two_stages import write_configs


@pytest.fixture
def configs(tmp_path, text_encoder):
    return write_configs(tmp_path, text_encoder)
