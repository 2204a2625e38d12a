"""Resource ids and environments."""

import pytest

from flynn.appliances.postgresql.provisioning import parse_id, provisioned
from flynn.types.errors import ValidationError

U, D = "0123456789abcdef" * 2, "fedcba9876543210" * 2


def test_what_an_app_gets() -> None:
    found = provisioned("postgres", U, "secret", D)
    assert found.id == f"/databases/{U}:{D}"
    assert found.env == {
        "FLYNN_POSTGRES": "postgres",
        "PGHOST": "leader.postgres.discoverd",
        "PGUSER": U,
        "PGPASSWORD": "secret",
        "PGDATABASE": D,
        "DATABASE_URL": f"postgres://{U}:secret@leader.postgres.discoverd:5432/{D}",
    }


@pytest.mark.parametrize("text", [f"/databases/{U}:{D}", f"{U}:{D}"])
def test_an_id_is_taken_apart(text: str) -> None:
    assert parse_id(text) == (U, D)


@pytest.mark.parametrize(
    "text",
    ["", "/databases/", f"/databases/{U}", f"{U}:", f":{D}", f"{U}:{D}:{D}", f"{U}:postgres", f'{U}:{D[:-1]}"'],
)
def test_a_name_we_never_made_is_refused(text: str) -> None:
    with pytest.raises(ValidationError) as refused:
        parse_id(text)
    assert refused.value.message == "id is invalid"
    assert refused.value.detail == {"field": "id"}
