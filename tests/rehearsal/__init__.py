"""The dress rehearsal: the recipes of `launch/recipes` on miniatures of everything they read.

`raw` writes every data set in the layout of its authors: ScanNet's scans from real RGB-D frames
where real data is at hand, 3D-FRONT's houses, the files of questions, videos, weights of random
numbers. The recipes then run as they stand, with the exporters of `third_party` in the stand-ins of
tests/third_party/fakes, and train the papers' configurations, of which only widths and depths are
smaller. Labels and questions are invented, so that scores mean nothing here.
"""
