/* A stand-in for NVIDIA's driver library: the cards are those of a text file, which is read again at every call, so a
   test changes what the cards show by replacing the file. NVML_STUB_CARDS names it; default /etc/nvidia-cards.

       driver 580.105.08
       cuda 13000
       p2p 0                     the status that each pair of cards gives: 0 is OK, 2 chipset not supported ...
       card                      begins a card; what follows is its own
       name NVIDIA GeForce RTX 5090
       memory 34190917632        bytes
       power none                a sensor that the card does not have
       process 4242 1073741824   a compute process and its bytes

   A PCIe counter takes 20 ms to read, as the real one does. Unknown keys are refused by lab/cards.py, not here. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7 };
enum { MAX_CARDS = 16, MAX_PROCESSES = 32, TEXT = 96, NONE = -1 };

#define NUMBERS(X)                                                                                                    \
    X(memory, 16LL << 30) X(memory_used, 0) X(utilization, 0) X(memory_utilization, 0)                                \
    X(pcie_generation, 5) X(pcie_generation_max, 5) X(pcie_generation_slot_max, 5) X(pcie_width, 16)                  \
    X(pcie_width_max, 16) X(pcie_sent, 0) X(pcie_received, 0) X(pcie_replays, 0) X(power, 30000)                      \
    X(power_limit, 600000) X(energy, 0) X(temperature, 40) X(sm_clock, 210) X(memory_clock, 405)                      \
    X(sm_clock_max, 3000) X(memory_clock_max, 14000) X(throttle_reasons, 1) X(fan, 30) X(performance_state, 8)        \
    X(encoder, 0) X(decoder, 0) X(compute_capability, 1200) X(numa_node, 0) X(bus, NONE)

typedef struct {
    char name[TEXT], uuid[TEXT];
#define FIELD(key, value) long long key;
    NUMBERS(FIELD)
    unsigned processes;
    struct { unsigned pid; unsigned long long bytes; } process[MAX_PROCESSES];
} card_t;

typedef struct {
    char driver[TEXT];
    long long cuda, p2p;
    unsigned count;
    card_t card[MAX_CARDS];
} cards_t;

static __thread cards_t cards;
static int initialised;

static void begin_card(void) {
    card_t *card = &cards.card[cards.count++];
    memset(card, 0, sizeof *card);
#define DEFAULT(key, value) card->key = value;
    NUMBERS(DEFAULT)
}

static void read_line(char *line) {
    char *value = strchr(line, ' ');
    line[strcspn(line, "\n")] = 0;
    if (value) *value++ = 0;
    if (!strcmp(line, "card") && cards.count < MAX_CARDS) begin_card();
    if (!value) return;
    long long number = strcmp(value, "none") ? atoll(value) : NONE;
    if (!strcmp(line, "driver")) snprintf(cards.driver, TEXT, "%s", value);
    if (!strcmp(line, "cuda")) cards.cuda = number;
    if (!strcmp(line, "p2p")) cards.p2p = number;
    if (!cards.count) return;
    card_t *card = &cards.card[cards.count - 1];
    if (!strcmp(line, "name")) snprintf(card->name, TEXT, "%s", value);
    if (!strcmp(line, "uuid")) snprintf(card->uuid, TEXT, "%s", value);
    if (!strcmp(line, "process") && card->processes < MAX_PROCESSES) {
        unsigned at = card->processes;
        if (sscanf(value, "%u %llu", &card->process[at].pid, &card->process[at].bytes) == 2) card->processes++;
    }
#define READ(key, value_) if (!strcmp(line, #key)) card->key = number;
    NUMBERS(READ)
}

static int look(void) {
    const char *path = getenv("NVML_STUB_CARDS");
    FILE *file = fopen(path ? path : "/etc/nvidia-cards", "r");
    char line[256];
    memset(&cards, 0, sizeof cards);
    snprintf(cards.driver, TEXT, "580.105.08");
    cards.cuda = 13000;
    if (!file) return 0;
    while (fgets(line, sizeof line, file)) read_line(line);
    fclose(file);
    return 1;
}

/* A handle is the card's index plus one. */
static card_t *card_of(void *device) {
    size_t at = (size_t)device;
    look();
    return initialised && at >= 1 && at <= cards.count ? &cards.card[at - 1] : NULL;
}

static int text(const char *from, char *to, unsigned length) {
    if (strlen(from) >= length) return INSUFFICIENT_SIZE;
    strcpy(to, from);
    return SUCCESS;
}

static int number(void *device, long long value, unsigned *to) {
    if (!device) return INVALID_ARGUMENT;
    if (value == NONE) return NOT_SUPPORTED;
    *to = (unsigned)value;
    return SUCCESS;
}

#define WITH_CARD card_t *card = card_of(device); if (!card) return initialised ? INVALID_ARGUMENT : UNINITIALIZED;
#define READS(function, key) int function(void *device, unsigned *value) { WITH_CARD return number(card, card->key, value); }
#define READS_KIND(function, expression)                                                                              \
    int function(void *device, unsigned kind, unsigned *value) { WITH_CARD (void)kind; return number(card, expression, value); }

int nvmlInit_v2(void) { if (!look()) return 9; initialised = 1; return SUCCESS; }
int nvmlInit(void) { return nvmlInit_v2(); }
int nvmlInitWithFlags(unsigned flags) { (void)flags; return nvmlInit_v2(); }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int code) {
    switch (code) {
        case SUCCESS: return "Success";
        case UNINITIALIZED: return "Uninitialized";
        case INVALID_ARGUMENT: return "Invalid Argument";
        case NOT_SUPPORTED: return "Not Supported";
        case NOT_FOUND: return "Not Found";
        case INSUFFICIENT_SIZE: return "Insufficient Size";
        case 9: return "Driver Not Loaded";
        default: return "Unknown Error";
    }
}
int nvmlSystemGetDriverVersion(char *to, unsigned length) { look(); return text(cards.driver, to, length); }
int nvmlSystemGetNVMLVersion(char *to, unsigned length) { look(); return text(cards.driver, to, length); }
int nvmlSystemGetCudaDriverVersion(int *version) { look(); *version = (int)cards.cuda; return SUCCESS; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { return nvmlSystemGetCudaDriverVersion(version); }

int nvmlDeviceGetCount_v2(unsigned *count) { look(); *count = cards.count; return SUCCESS; }
int nvmlDeviceGetCount(unsigned *count) { return nvmlDeviceGetCount_v2(count); }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
    look();
    if (index >= cards.count) return INVALID_ARGUMENT;
    *device = (void *)(size_t)(index + 1);
    return SUCCESS;
}
int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
    look();
    for (unsigned i = 0; i < cards.count; i++)
        if (!strcmp(cards.card[i].uuid, uuid)) return nvmlDeviceGetHandleByIndex_v2(i, device);
    return NOT_FOUND;
}
int nvmlDeviceGetName(void *device, char *to, unsigned length) { WITH_CARD return text(card->name, to, length); }
int nvmlDeviceGetUUID(void *device, char *to, unsigned length) { WITH_CARD return text(card->uuid, to, length); }
int nvmlDeviceGetIndex(void *device, unsigned *value) { WITH_CARD return number(card, (long long)(size_t)device - 1, value); }
int nvmlDeviceGetMinorNumber(void *device, unsigned *value) { return nvmlDeviceGetIndex(device, value); }
int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) {
    WITH_CARD
    *major = (int)(card->compute_capability / 100);
    *minor = (int)(card->compute_capability / 10 % 10);
    return SUCCESS;
}

typedef struct {
    char legacy[16];
    unsigned domain, bus, device, pci_device_id, pci_subsystem_id;
    char bus_id[32];
} pci_t;
int nvmlDeviceGetPciInfo_v3(void *device, pci_t *pci) {
    WITH_CARD
    memset(pci, 0, sizeof *pci);
    pci->bus = card->bus == NONE ? (unsigned)(size_t)device : (unsigned)card->bus;
    pci->pci_device_id = 0x2B8510DE;
    snprintf(pci->legacy, sizeof pci->legacy, "0000:%02X:00.0", pci->bus & 0xFF);
    snprintf(pci->bus_id, sizeof pci->bus_id, "00000000:%02X:00.0", pci->bus & 0xFF);
    return SUCCESS;
}

typedef struct { unsigned long long total, free, used; } memory_t;
int nvmlDeviceGetMemoryInfo(void *device, memory_t *memory) {
    WITH_CARD
    memory->total = (unsigned long long)card->memory;
    memory->used = (unsigned long long)card->memory_used;
    memory->free = memory->total - memory->used;
    return SUCCESS;
}
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } memory_v2_t;
int nvmlDeviceGetMemoryInfo_v2(void *device, memory_v2_t *memory) {
    memory_t plain;
    int code = nvmlDeviceGetMemoryInfo(device, &plain);
    if (code) return code;
    memory->total = plain.total, memory->free = plain.free, memory->used = plain.used, memory->reserved = 0;
    return SUCCESS;
}

typedef struct { unsigned gpu, memory; } utilization_t;
int nvmlDeviceGetUtilizationRates(void *device, utilization_t *rates) {
    WITH_CARD
    if (card->utilization == NONE) return NOT_SUPPORTED;
    rates->gpu = (unsigned)card->utilization;
    rates->memory = card->memory_utilization == NONE ? 0 : (unsigned)card->memory_utilization;
    return SUCCESS;
}
int nvmlDeviceGetEncoderUtilization(void *device, unsigned *value, unsigned *period) {
    WITH_CARD *period = 100000; return number(card, card->encoder, value);
}
int nvmlDeviceGetDecoderUtilization(void *device, unsigned *value, unsigned *period) {
    WITH_CARD *period = 100000; return number(card, card->decoder, value);
}

READS(nvmlDeviceGetCurrPcieLinkGeneration, pcie_generation)
READS(nvmlDeviceGetMaxPcieLinkGeneration, pcie_generation_slot_max)
READS(nvmlDeviceGetGpuMaxPcieLinkGeneration, pcie_generation_max)
READS(nvmlDeviceGetCurrPcieLinkWidth, pcie_width)
READS(nvmlDeviceGetMaxPcieLinkWidth, pcie_width_max)
READS(nvmlDeviceGetPcieReplayCounter, pcie_replays)
READS(nvmlDeviceGetPowerUsage, power)
READS(nvmlDeviceGetEnforcedPowerLimit, power_limit)
READS(nvmlDeviceGetPowerManagementLimit, power_limit)
READS(nvmlDeviceGetFanSpeed, fan)
READS(nvmlDeviceGetPerformanceState, performance_state)
READS(nvmlDeviceGetNumaNodeId, numa_node)
READS_KIND(nvmlDeviceGetTemperature, card->temperature)
READS_KIND(nvmlDeviceGetClockInfo, kind == 2 ? card->memory_clock : card->sm_clock)
READS_KIND(nvmlDeviceGetMaxClockInfo, kind == 2 ? card->memory_clock_max : card->sm_clock_max)

/* KiB a second over the last 20 ms; counter 0 is what the card sends, 1 what it receives. */
int nvmlDeviceGetPcieThroughput(void *device, unsigned counter, unsigned *value) {
    usleep(20000);
    WITH_CARD
    return number(card, counter ? card->pcie_received : card->pcie_sent, value);
}
int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *millijoules) {
    WITH_CARD
    if (card->energy == NONE) return NOT_SUPPORTED;
    *millijoules = (unsigned long long)card->energy;
    return SUCCESS;
}
int nvmlDeviceGetCurrentClocksEventReasons(void *device, unsigned long long *reasons) {
    WITH_CARD
    if (card->throttle_reasons == NONE) return NOT_SUPPORTED;
    *reasons = (unsigned long long)card->throttle_reasons;
    return SUCCESS;
}
int nvmlDeviceGetCurrentClocksThrottleReasons(void *device, unsigned long long *reasons) {
    return nvmlDeviceGetCurrentClocksEventReasons(device, reasons);
}

int nvmlDeviceGetP2PStatus(void *device, void *other, unsigned index, unsigned *status) {
    (void)index;
    WITH_CARD
    *status = (unsigned)cards.p2p;
    return card_of(other) ? SUCCESS : INVALID_ARGUMENT;
}
int nvmlDeviceGetTopologyCommonAncestor(void *device, void *other, unsigned *level) {
    WITH_CARD
    *level = device == other ? 0 : 30; /* a PCIe host bridge */
    return card_of(other) ? SUCCESS : INVALID_ARGUMENT;
}

typedef struct { unsigned pid; unsigned long long bytes; unsigned gpu_instance, compute_instance; } process_t;
int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count, process_t *processes) {
    WITH_CARD
    unsigned room = *count;
    *count = card->processes;
    if (room < card->processes) return INSUFFICIENT_SIZE;
    for (unsigned i = 0; i < card->processes; i++)
        processes[i] = (process_t){card->process[i].pid, card->process[i].bytes, 0xFFFFFFFF, 0xFFFFFFFF};
    return SUCCESS;
}
int nvmlDeviceGetComputeRunningProcesses_v2(void *device, unsigned *count, process_t *processes) {
    return nvmlDeviceGetComputeRunningProcesses_v3(device, count, processes);
}
int nvmlDeviceGetGraphicsRunningProcesses_v3(void *device, unsigned *count, process_t *processes) {
    WITH_CARD (void)processes; *count = 0; return SUCCESS;
}
int nvmlDeviceGetGraphicsRunningProcesses_v2(void *device, unsigned *count, process_t *processes) {
    return nvmlDeviceGetGraphicsRunningProcesses_v3(device, count, processes);
}
int nvmlDeviceGetMigMode(void *device, unsigned *now, unsigned *pending) { WITH_CARD (void)now, (void)pending; return NOT_SUPPORTED; }
int nvmlDeviceGetMaxMigDeviceCount(void *device, unsigned *count) { WITH_CARD *count = 0; return SUCCESS; }
