// SPDX-License-Identifier: MIT
/*
 * The value of a state, and taking it in one step: hvmodel._state, a third module in the same
 * library as hvmodel._native.
 *
 * After ten ioctls caches and branch predictors are cold (see pyrun.c), and what Python executes
 * then costs as much as one of them.  So the kernel's bytes go straight into a bytes object, and
 * the value around it is made here.  Everything else is Python's: hvmodel/state/block.py.
 */
#if !defined(Py_GIL_DISABLED)
#define Py_LIMITED_API 0x030b0000
#endif
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stddef.h>
#include <structmember.h>

#include "kvm_uapi.h"
#include "run.h"
#include "state.h"

struct block {
	PyObject head; /* PyObject_HEAD */
	PyObject *block;
	PyObject *layout;
	PyObject *taken;
};

static PyMemberDef members[] = {
	{"_block", T_OBJECT_EX, offsetof(struct block, block), 0, "the bytes of all parts"},
	{"_layout", T_OBJECT_EX, offsetof(struct block, layout), 0, "where each part is"},
	{"_known", T_OBJECT_EX, offsetof(struct block, taken), 0, "who takes it, or None"},
	{NULL, 0, 0, 0, NULL},
};

/* What it has refers to no state: there are no cycles, and it is no business of the collector's. */
static void dealloc(PyObject *self)
{
	struct block *state = (struct block *)self;
	PyTypeObject *type = Py_TYPE(self);
	freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);

	Py_XDECREF(state->block);
	Py_XDECREF(state->layout);
	Py_XDECREF(state->taken);
	release(self);
	Py_DECREF((PyObject *)type);
}

static PyType_Slot slots[] = {
	{Py_tp_dealloc, dealloc},
	{Py_tp_members, members},
	{Py_tp_doc, "Block()\n--\n\nThree places of a state, for hvmodel.state.block."},
	{0, NULL},
};

static PyType_Spec spec = {
	.name = "hvmodel._state.Block",
	.basicsize = sizeof(struct block),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
	.slots = slots,
};

/*
 * take(cls, vcpu, request): a new cls, or the int that hv_state_get() gave.  `vcpu` is an address;
 * `request` is (address of the parts, how many, the block as it is before, its layout, who takes
 * it).
 */
static PyObject *take(PyObject *module, PyObject *const *args, Py_ssize_t nr_args)
{
	const struct hv_part *parts;
	PyTypeObject *type;
	struct block *state;
	struct hv_vcpu *vcpu;
	PyObject *request, *blank, *block;
	uint8_t *bytes;
	uint32_t nr;
	int64_t rc;

	(void)module;
	if (nr_args != 3 || !PyType_Check(args[0]) || !PyTuple_Check(args[2]) ||
	    PyTuple_Size(args[2]) != 5 || !PyBytes_Check(PyTuple_GetItem(args[2], 2))) {
		PyErr_SetString(PyExc_TypeError, "take(cls, vcpu, request)");
		return NULL;
	}
	type = (PyTypeObject *)args[0];
	vcpu = PyLong_AsVoidPtr(args[1]);
	request = args[2];
	parts = PyLong_AsVoidPtr(PyTuple_GetItem(request, 0));
	nr = (uint32_t)PyLong_AsUnsignedLong(PyTuple_GetItem(request, 1));
	blank = PyTuple_GetItem(request, 2);
	if (PyErr_Occurred())
		return NULL;
	block = PyBytes_FromStringAndSize(PyBytes_AsString(blank), PyBytes_Size(blank));
	if (!block)
		return NULL;
	bytes = (uint8_t *)PyBytes_AsString(block); /* nobody else has it yet */
	Py_BEGIN_ALLOW_THREADS;
	rc = hv_state_get(vcpu, parts, nr, bytes);
	Py_END_ALLOW_THREADS;
	if (rc) {
		Py_DECREF(block);
		return PyLong_FromLongLong(rc);
	}
	state = (struct block *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
	if (!state) {
		Py_DECREF(block);
		return NULL;
	}
	state->block = block;
	state->layout = PyTuple_GetItem(request, 3);
	state->taken = PyTuple_GetItem(request, 4);
	Py_INCREF(state->layout);
	Py_INCREF(state->taken);
	return (PyObject *)state;
}

static PyMethodDef functions[] = {
	{"take", (PyCFunction)(void (*)(void))take, METH_FASTCALL,
	 "take(cls, vcpu, request): a new state, or a word of hv_state_get"},
	{NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
	.m_base = PyModuleDef_HEAD_INIT,
	.m_name = "hvmodel._state",
	.m_size = -1,
	.m_methods = functions,
};

PyMODINIT_FUNC PyInit__state(void);
PyMODINIT_FUNC PyInit__state(void)
{
	PyObject *module = PyModule_Create(&definition);
	PyObject *type = PyType_FromSpec(&spec);

	if (!module || !type || PyModule_AddObject(module, "Block", type)) {
		Py_XDECREF(module);
		Py_XDECREF(type);
		return NULL;
	}
	return module;
}
