"""Page Data: what it shows of a set, what it says is wrong, how it writes captions."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from nicegui import ui
from nicegui.testing import User
from PIL import Image
from tests.studio.conftest import Visit, until

from dittocache.studio.state import Studio
from dittocache.studio.thumbnails import thumbnail_url


def shows(user: User, words: str) -> bool:
    """Whether a label of the page holds these words."""
    with user:
        found = [element for element in user.client.elements.values() if isinstance(element, ui.label)]  # type: ignore[union-attr]
    return any(words in element.text for element in found)


async def test_a_set_is_shown_with_captions_controls_and_sizes(studio: Studio, visit: Visit, edits: Path) -> None:
    studio.draft.update({"data.path": str(edits), "data.resolution": 64})
    async with visit(studio) as user:
        await user.open("/data")
        await user.should_see("4 samples · nothing wrong", retries=300)
        await user.should_see("make number 3 blue")
        assert shows(user, "64 × 64") and shows(user, "64 × 32") is False and shows(user, "2")


async def test_everything_wrong_is_listed_and_the_samples_are_there_all_the_same(
    studio: Studio, visit: Visit, edits: Path
) -> None:
    (edits / "training_images" / "edit-0.txt").unlink()
    (edits / "training_images" / "edit-1.png").write_text("no picture")
    (edits / "control_images" / "edit-2.png").unlink()
    studio.draft.set("data.path", str(edits))
    async with visit(studio) as user:
        await user.open("/data")
        await user.should_see("4 samples · 3 problems", retries=300)
        for words in ("edit-0.png: no caption", "edit-1.png cannot be read", "no control picture edit-2"):
            assert shows(user, words), words
        await user.should_see("no caption")


async def test_a_missing_caption_is_written_in_the_page(studio: Studio, visit: Visit, edits: Path) -> None:
    file = edits / "training_images" / "edit-0.txt"
    file.unlink()
    studio.draft.set("data.path", str(edits))
    async with visit(studio) as user:
        await user.open("/data")
        await user.should_see("4 samples · 1 problem", retries=300)
        user.find(marker="sample-0").click()
        user.find(kind=ui.textarea).type("a red square")
        user.find("Save caption").click()
        await until(file.exists)
        assert file.read_text(encoding="utf-8") == "a red square\n"
        await user.should_see("4 samples · nothing wrong", retries=300)


async def test_a_path_outside_the_roots_is_refused(studio: Studio, visit: Visit, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    studio.draft.set("data.path", str(outside))
    async with visit(studio) as user:
        await user.open("/data")
        await user.should_see("1 problem", retries=300)
        assert shows(user, "is outside the Studio's folders")


async def test_small_pictures_are_made_once_and_only_of_allowed_pictures(
    studio: Studio, visit: Visit, edits: Path, tmp_path: Path
) -> None:
    picture = edits / "training_images" / "edit-0.png"
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    async with visit(studio) as user:
        client = user.http_client
        first = await client.get(thumbnail_url(picture))
        assert first.status_code == 200 and first.headers["content-type"] == "image/webp"
        assert "immutable" in first.headers["cache-control"]
        made = list(studio.thumbnails.rglob("*.webp"))
        await client.get(thumbnail_url(picture))
        assert list(studio.thumbnails.rglob("*.webp")) == made
        assert (await client.get(thumbnail_url(secret))).status_code == 403
        assert (await client.get(thumbnail_url(edits / "training_images" / "edit-0.txt"))).status_code == 404
        assert (await client.get("/picture", params={"path": str(secret)})).status_code == 403


def test_a_changed_picture_has_another_address(edits: Path) -> None:
    picture = edits / "training_images" / "edit-0.png"
    former = thumbnail_url(picture)
    Image.new("RGB", (99, 99), (1, 2, 3)).save(picture)
    versions = {parse_qs(urlsplit(url).query)["version"][0] for url in (former, thumbnail_url(picture))}
    assert len(versions) == 2


async def test_a_file_name_is_shown_as_text(studio: Studio, visit: Visit, edits: Path) -> None:
    name = "<img src=x onerror=alert(1)>"
    Image.new("RGB", (48, 48)).save(edits / "training_images" / f"{name}.png")
    studio.draft.set("data.path", str(edits))
    async with visit(studio) as user:
        await user.open("/data")
        await user.should_see(name, retries=300)
        with user:
            html = [one for one in user.client.elements.values() if isinstance(one, ui.html)]  # type: ignore[union-attr]
        assert not html
