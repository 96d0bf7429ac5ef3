"""The packages that are installed, against those that we declare."""

from __future__ import annotations

from loraplex.engine import versions


def test_the_installed_packages_are_suitable():
    assert list(versions.unsuitable_packages()) == []


def test_a_package_that_is_too_old_is_named_when_an_engine_starts(monkeypatch, caplog):
    found = versions.version
    monkeypatch.setattr(
        versions, "version", lambda name: "5.17.0" if name == "transformers" else found(name)
    )
    versions.warn_of_unsuitable_packages()
    (record,) = caplog.records
    expected = "transformers 5.17.0 is installed, and it must be transformers<6,>=5.20"
    assert expected in record.message
