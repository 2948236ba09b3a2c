// The few functions of the CUDA driver API that the test engine uses, found in libcuda at run time: no header of CUDA is
// needed to build it.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <dlfcn.h>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>

namespace cuda {

using Status = int;
using Pointer = std::uint64_t;
using Context = void *;
using Stream = void *;

// The driver as it is used for one device.
class Driver {
public:
    // Null where there is no driver or no such device.
    static const Driver *open(int device) {
        static std::map<int, std::unique_ptr<const Driver>> drivers;
        std::unique_ptr<const Driver> &driver = drivers[device];
        if (driver == nullptr) driver.reset(new Driver(device));
        return driver->usable_ ? driver.get() : nullptr;
    }

    Pointer allocate(std::size_t bytes, Stream stream) const {
        const Entered entered(*this);
        Pointer data = 0;
        return mem_alloc_async_(&data, bytes, stream) == 0 ? data : 0;
    }
    void free(Pointer data, Stream stream) const {
        const Entered entered(*this);
        check(mem_free_async_(data, stream), "cuMemFreeAsync");
    }
    // In the stream's order. `from` may be used again at once: pageable memory is copied before the call returns.
    void upload(Pointer to, const void *from, std::size_t bytes, Stream stream) const {
        const Entered entered(*this);
        check(to_device_(to, from, bytes, stream), "cuMemcpyHtoDAsync");
    }
    void download(void *to, Pointer from, std::size_t bytes) const {
        const Entered entered(*this);
        check(to_host_(to, from, bytes), "cuMemcpyDtoH");
    }
    Stream stream() const {
        const Entered entered(*this);
        Stream stream = nullptr;
        check(stream_create_(&stream, 1), "cuStreamCreate");
        return stream;
    }
    void synchronize(Stream stream) const {
        const Entered entered(*this);
        check(stream_synchronize_(stream), "cuStreamSynchronize");
    }
    // The stream waits until `opened` is set, or for 20 seconds.
    void block(Stream stream, const std::atomic<bool> &opened) const {
        const auto wait = [](void *opened) {
            const auto *flag = static_cast<const std::atomic<bool> *>(opened);
            for (int ms = 0; ms < 20000 && !flag->load(); ++ms) std::this_thread::sleep_for(std::chrono::milliseconds(1));
        };
        const Entered entered(*this);
        check(launch_host_(stream, wait, const_cast<std::atomic<bool> *>(&opened)), "cuLaunchHostFunc");
    }

private:
    // The device's primary context is current on this thread as long as the value lives.
    struct Entered {
        explicit Entered(const Driver &driver) : driver_(driver) { check(driver.push_(driver.context_), "cuCtxPushCurrent"); }
        ~Entered() {
            Context context = nullptr;
            driver_.pop_(&context);
        }
        Entered(const Entered &) = delete;
        Entered &operator=(const Entered &) = delete;

    private:
        const Driver &driver_;
    };

    explicit Driver(int ordinal) {
        void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
        if (library == nullptr) return;
        find(library, "cuInit", init_);
        find(library, "cuDeviceGet", device_get_);
        find(library, "cuDevicePrimaryCtxRetain", retain_);
        find(library, "cuCtxPushCurrent_v2", push_);
        find(library, "cuCtxPopCurrent_v2", pop_);
        find(library, "cuMemAllocAsync", mem_alloc_async_);
        find(library, "cuMemFreeAsync", mem_free_async_);
        find(library, "cuMemcpyHtoDAsync_v2", to_device_);
        find(library, "cuMemcpyDtoH_v2", to_host_);
        find(library, "cuStreamCreate", stream_create_);
        find(library, "cuStreamSynchronize", stream_synchronize_);
        find(library, "cuLaunchHostFunc", launch_host_);
        int device = 0;
        if (init_(0) != 0 || device_get_(&device, ordinal) != 0) return;
        check(retain_(&context_, device), "cuDevicePrimaryCtxRetain");
        usable_ = true;
    }

    template <class Function>
    static void find(void *library, const char *name, Function &function) {
        function = reinterpret_cast<Function>(dlsym(library, name));
        if (function == nullptr) throw std::runtime_error(std::string("libcuda has no ") + name);
    }

    static void check(Status status, const char *what) {
        if (status != 0) throw std::runtime_error(std::string(what) + " answered " + std::to_string(status));
    }

    bool usable_ = false;
    Context context_ = nullptr;
    Status (*init_)(unsigned) = nullptr;
    Status (*device_get_)(int *, int) = nullptr;
    Status (*retain_)(Context *, int) = nullptr;
    Status (*push_)(Context) = nullptr;
    Status (*pop_)(Context *) = nullptr;
    Status (*mem_alloc_async_)(Pointer *, std::size_t, Stream) = nullptr;
    Status (*mem_free_async_)(Pointer, Stream) = nullptr;
    Status (*to_device_)(Pointer, const void *, std::size_t, Stream) = nullptr;
    Status (*to_host_)(void *, Pointer, std::size_t) = nullptr;
    Status (*stream_create_)(Stream *, unsigned) = nullptr;
    Status (*stream_synchronize_)(Stream) = nullptr;
    Status (*launch_host_)(Stream, void (*)(void *), void *) = nullptr;
};

}  // namespace cuda
