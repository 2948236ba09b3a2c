// Stand-in for InfiniCore's tensors: as much of them as the shim uses.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

namespace infinicore {

class Device {
public:
    enum class Type { CPU, NVIDIA, OTHER };
    Device(const Type &type = Type::CPU, const std::size_t &index = 0) : type_(type), index_(index) {}
    const Type &getType() const { return type_; }
    const std::size_t &getIndex() const { return index_; }
    bool operator==(const Device &other) const { return type_ == other.type_ && index_ == other.index_; }
    static std::string toString(const Type &type) { return std::to_string(static_cast<int>(type)); }

private:
    Type type_;
    std::size_t index_;
};

enum class DataType { I8, F16, F32, BF16 };

class TensorImpl {
public:
    std::byte *start = nullptr;
    std::vector<std::size_t> sizes;
    std::vector<std::ptrdiff_t> steps;
    DataType type = DataType::F32;
    Device where;

    const std::byte *data() const { return start; }
    std::size_t ndim() const { return sizes.size(); }
    std::size_t size(std::size_t axis) const { return sizes.at(axis); }
    std::ptrdiff_t stride(std::size_t axis) const { return steps.at(axis); }
    DataType dtype() const { return type; }
    Device device() const { return where; }
    std::string info() const { return "a tensor of " + std::to_string(ndim()) + " axes"; }
};

class Tensor {
public:
    Tensor() = default;
    explicit Tensor(TensorImpl impl) : impl_(std::make_shared<TensorImpl>(std::move(impl))) {}
    bool empty() const noexcept { return impl_ == nullptr; }
    TensorImpl *operator->() { return impl_.get(); }
    const TensorImpl *operator->() const { return impl_.get(); }

private:
    std::shared_ptr<TensorImpl> impl_;
};

}  // namespace infinicore
