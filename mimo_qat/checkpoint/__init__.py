"""Checkpoints of MiMo-V2 models, from a configuration alone to bytes on disk.

geometry.py  what a config.json says about shapes          (standard library only)
layout.py    every tensor: name, dtype, shape, file         (standard library only)
reader.py    a folder as named tensors, proved complete     (torch, safetensors)
writer.py    tensors as a folder, whole or not at all       (torch)
check.py     `mimo-qat check`: what is wrong with a folder, what it would cause, what to do
findings.py  every kind of finding, with what it causes and its remedy
"""
