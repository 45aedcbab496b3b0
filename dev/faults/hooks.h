// What every hook needs: the function that it stands in front of, and an end without ceremony.
#pragma once

#include <dlfcn.h>
#include <signal.h>
#include <unistd.h>

constexpr int kPathSize = 1024;
constexpr int kFirstOwnFd = 600;  // the library's own descriptors are out of the program's way

// Defines the function that the program finds under the name. Its own name here is another, so that
// it need not repeat what the system's headers say of the exceptions and attributes of the
// original.
#define HOOK(type, name, ...)                         \
    extern "C" __attribute__((visibility("default"))) \
    type hook_##name(__VA_ARGS__) __asm__(#name);     \
    type hook_##name(__VA_ARGS__)

// The original of a function that a header declares.
#define REAL(name)                                             \
    ([] {                                                      \
        static void* found = nullptr;                          \
        if (found == nullptr) found = dlsym(RTLD_NEXT, #name); \
        return reinterpret_cast<decltype(&::name)>(found);     \
    }())

// Ends the process as a kill from outside would: no handler, no destructor, no flush.
[[noreturn]] inline void die() {
    for (;;) kill(getpid(), SIGKILL);
}
