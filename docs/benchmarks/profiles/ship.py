"""A searched profile as it is shipped: ``python ship.py searched.yaml --name MODEL --out ../../../profiles/NAME.yaml``.

Points that held-out data do not confirm are left out, also of the recipe, and the model gets the name that a user knows it by.
Thresholds and evidence stay as they were found: a point does not depend on the other targets of its search.
"""

import argparse
from pathlib import Path

from xcalib.profile import Profile, load_profile, make_profile, save_profile


def shipped(profile: Profile, name: str) -> Profile:
    """``profile`` with its verified points only, for the model called ``name``."""
    points = tuple(point for point in profile.points if point.verified and point.heldout is not None)
    if not points:
        raise SystemExit("held-out data confirm no point of this profile: there is nothing to ship")
    kept = {point.name for point in points}
    recipe = dict(profile.recipe or {})
    recipe["target"] = tuple(target for target in recipe.get("target", ()) if target.partition(":")[0] in kept)
    default = profile.default_point if profile.default_point in kept else points[0].name
    model = profile.model.model_copy(update={"name": name})
    changed = {"points": points, "recipe": recipe, "model": model, "default_point": default}
    return make_profile(**{**dict(profile), **changed})


def main() -> None:
    """Read, leave out, write, and say what is left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("searched", type=Path)
    parser.add_argument("--name", required=True, help="the model's name")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    profile = shipped(load_profile(options.searched), options.name)
    save_profile(profile, options.out)
    print(f"{options.out}: {', '.join(point.name for point in profile.points)}")


if __name__ == "__main__":
    main()
