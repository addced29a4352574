"""What a user sees: lines and bars in a terminal, pages, pictures.

`console.py` speaks (`Reporter`), `progress.py` makes every bar, `html.py` writes pages that run and
load nothing, `svg.py` draws line charts as inline SVG, `plotting.py` what needs matplotlib (extra
`study`), and `report.py` is what a run came to. What comes from outside is text: never markup,
never a control character.

May import rich, and `files` to write; `report.py` alone knows recipes and run folders. Imports no
torch: what is shown are numbers and words.
"""
