"""The device under torch_npu's operators, emulated on the CPU: what `evenmoe.ascend.patch(npu=True)` puts in place."""
