// `import aeup._C` loads the library, which registers the operators of ops.cpp; the module itself is empty.
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

static PyModuleDef module_def = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&module_def); }
