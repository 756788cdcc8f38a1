/* A stand-in for NVIDIA's driver library with two cards, for machines that have none: card 1 has no power sensor and
   no PCIe counter, and reading a counter takes 20 ms, as the real library does. */
#include <string.h>
#include <unistd.h>

enum { OK = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3 };
#define CARD(handle) ((long)(handle) - 1)

typedef struct { unsigned long long total, free, used; } memory_t;
typedef struct { unsigned gpu, memory; } utilization_t;

int nvmlInitWithFlags(unsigned flags) { (void)flags; return OK; }
int nvmlShutdown(void) { return OK; }
const char *nvmlErrorString(int code) { return code == NOT_SUPPORTED ? "Not Supported" : "Invalid Argument"; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return OK; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    if (index > 1) return INVALID_ARGUMENT;
    *handle = (void *)(long)(index + 1);
    return OK;
}
int nvmlDeviceGetName(void *device, char *name, unsigned length) {
    strncpy(name, CARD(device) ? "NVIDIA RTX PRO 6000" : "NVIDIA GeForce RTX 5090", length);
    return OK;
}
int nvmlDeviceGetUUID(void *device, char *uuid, unsigned length) {
    strncpy(uuid, CARD(device) ? "GPU-1" : "GPU-0", length);
    return OK;
}
int nvmlDeviceGetMemoryInfo(void *device, memory_t *memory) {
    memory->total = (CARD(device) ? 96ULL : 32ULL) << 30;
    memory->used = 2ULL << 30;
    memory->free = memory->total - memory->used;
    return OK;
}
int nvmlDeviceGetUtilizationRates(void *device, utilization_t *rates) {
    rates->gpu = 70 + (unsigned)CARD(device);
    rates->memory = 30;
    return OK;
}
int nvmlDeviceGetPowerUsage(void *device, unsigned *milliwatts) {
    *milliwatts = 250500;
    return CARD(device) ? NOT_SUPPORTED : OK;
}
int nvmlDeviceGetClockInfo(void *device, unsigned kind, unsigned *mhz) {
    (void)device;
    *mhz = kind == 1 ? 2400 : 14000;
    return OK;
}
int nvmlDeviceGetTemperature(void *device, unsigned sensor, unsigned *celsius) {
    (void)device, (void)sensor;
    *celsius = 61;
    return OK;
}
int nvmlDeviceGetCurrPcieLinkGeneration(void *device, unsigned *generation) { (void)device; *generation = 5; return OK; }
int nvmlDeviceGetCurrPcieLinkWidth(void *device, unsigned *lanes) { *lanes = CARD(device) ? 8 : 16; return OK; }
int nvmlDeviceGetPcieThroughput(void *device, unsigned counter, unsigned *kib_per_second) {
    if (CARD(device)) return NOT_SUPPORTED;
    usleep(20000);
    *kib_per_second = counter == 0 ? 1000 : 2000;
    return OK;
}
