"""What a finished run's student becomes elsewhere: a repository on the hub, a graph for ONNX.

`push.py` and `onnx_graph.py` read a run's folder and write no part of it but `student/onnx`. They
stand on `fastkd.training`, and nothing but the command line stands on them.
"""
