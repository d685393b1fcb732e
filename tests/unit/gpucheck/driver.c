// As much of CUDA's driver as the allocators of tests/gpu/managed.cpp ask for; managed memory lies at whole pages.
#include <stdlib.h>

static void* current;

int cuInit(unsigned flags) { return 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = &current;
  return 0;
}
int cuCtxGetCurrent(void** context) {
  *context = current;
  return 0;
}
int cuCtxSetCurrent(void* context) {
  current = context;
  return 0;
}
int cuMemAllocManaged(unsigned long long* address, size_t bytes, unsigned flags) {
  if (current == NULL) return 201;
  void* found = NULL;
  if (posix_memalign(&found, 4096, bytes)) return 2;
  *address = (unsigned long long)found;
  return 0;
}
int cuMemFree_v2(unsigned long long address) {
  free((void*)address);
  return 0;
}
