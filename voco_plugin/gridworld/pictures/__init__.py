"""Named pictures: scenes of drawings that one vendor draws so and another otherwise, and a tower for them.

Reading order: `vocabulary` (the names, their kinds, which are held out), `drawings` (a vendor's drawings out
of an unpacked npm package), `picture_scenes` (what is where, and how it is painted), `picture_questions`
(what is asked and the exact answer), `picture_dataset` (writes LLaVA JSON and a `datasets` folder). The
tower: `lite0_weights` (ImageNet weights out of a package), `picture_canvases` (what it is trained and
measured on), `picture_tower`.

The artwork is read from the packages that it comes in and is no part of this one.
"""
