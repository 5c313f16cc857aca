"""Common names of columns, for catalogues whose columns are not called as the defaults of `catalog.fields`."""

from __future__ import annotations

from collections.abc import Sequence

from mmsid.catalog.fields.presets import normal_name

# key of catalog.fields -> names in the form of `normal_name`, in groups: a later group counts only when no earlier one matches
COMMON_NAMES: dict[str, tuple[str, ...]] = {
    "item_id": (
        "item_id",
        "product_id ad_id sku asin parent_asin article_id movie_id creative_id offer_id pid",
        "id uid uuid code ean gtin upc",
    ),
    "title": (
        "title",
        "item_title product_title product_name item_name ad_title product_display_name prod_name headline movie_title",
        "name",
    ),
    "description": (
        "description",
        "item_description product_description long_description body body_html detail_desc desc description_text",
        "text summary",
    ),
    "image": (
        "image images",
        "image_path image_file image_url image_link img img_url img_path picture pictures photo photos picture_url photo_url image_src "
        "imurl filename file_name primary_image main_image",
        "thumbnail",
    ),
    "categories": (
        "categories category",
        "product_category item_category category_path category_name categories_path product_type google_product_category breadcrumb "
        "breadcrumbs taxonomy department",
    ),
}


def common_candidates(key: str, columns: Sequence[str]) -> list[str]:
    """Columns with a common name for the field `key`: those of the first group of names that matches any column."""
    for group in COMMON_NAMES[key]:
        names = {name.replace("_", "") for name in group.split()}
        found = [column for column in columns if normal_name(column).replace("_", "") in names]
        if found:
            return found
    return []
