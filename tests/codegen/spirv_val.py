"""Validates SPIR-V modules: spirv_val.py ENVIRONMENT FILE...

Prints what SPIRV-Tools objects to, file by file, and fails if it does. SPIRV-Tools are those in the library of
ai-ml-sdk-scenario-runner, which exports their C interface.
"""

import ctypes
import importlib.util
import sys


class Diagnostic(ctypes.Structure):
    _fields_ = [("position", ctypes.c_size_t * 3), ("error", ctypes.c_char_p)]


def main(environment, paths):
    spec = importlib.util.find_spec("scenario_runner_py")
    if spec is None:
        sys.exit("no ai-ml-sdk-scenario-runner here: pip install -r tests/codegen/requirements.txt")
    tools = ctypes.CDLL(spec.origin)
    tools.spvContextCreate.restype = ctypes.c_void_p
    number = ctypes.c_int()
    if not tools.spvParseTargetEnv(environment.encode(), ctypes.byref(number)):
        sys.exit(f"SPIRV-Tools know no environment {environment}")
    context = ctypes.c_void_p(tools.spvContextCreate(number))
    failures = 0
    for path in paths:
        with open(path, "rb") as file:
            words = file.read()
        diagnostic = ctypes.POINTER(Diagnostic)()
        code = tools.spvValidateBinary(
            context, words, ctypes.c_size_t(len(words) // 4), ctypes.byref(diagnostic)
        )
        if code != 0:
            failures += 1
            reason = diagnostic.contents.error.decode() if diagnostic else f"error {code}"
            print(f"{path}: {reason}", file=sys.stderr)
    if failures:
        sys.exit(f"{failures} of {len(paths)} modules are not valid")


main(sys.argv[1], sys.argv[2:])
